/* What `cloister.host._audit` offers to Python. Declarations only: cffi reads this file, and so does the compiler.
 * Errors are negative errno. Nothing here is called by two threads at once with the same reader. */

typedef struct reader reader;

/* Objects, one per line, become lines of the log. `seq` and `hash` are those of the last line, before and after.
   Returns the bytes in `out`; at most `length` plus LINE_MORE per object. */
int64_t chain_lines(const char *objects, size_t length, uint64_t *seq, uint8_t *hash, char *out, size_t room);

reader *reader_open(int critical, uint64_t critical_size, int bulk, uint64_t bulk_size, const uint8_t *boot_id);
void reader_close(reader *r);
/* Which fields stand in the events of a watch: JSON, `"run":"…","agent":"…",`. */
int reader_watch(reader *r, uint32_t id, const char *fields, size_t length);
void reader_forget(reader *r, uint32_t id);
/* What a system call's event is: its name, its kind and severity, where its texts stand, which argument is flags. */
int reader_call(reader *r, uint32_t number, const char *name, const char *kind, int severity, int shape, int flags_at);
/* Lines of these event types (bits) are copied for `reader_teed` as well. */
void reader_tee(reader *r, uint64_t types);
/* Lines of what waits in the rings, whole ones only. Nothing is taken from the rings before `reader_commit`; without
   it the next call begins at the same place. `any`: also events of watches that nobody named. */
int64_t reader_take(reader *r, uint64_t *seq, uint8_t *hash, char *out, size_t room, int any);
void reader_commit(reader *r);
uint64_t reader_waiting(const reader *r);
/* The watch whose event stopped the last `reader_take`, because nobody named it; 0 for none. */
uint32_t reader_stranger(const reader *r);
const char *reader_teed(const reader *r, size_t *length);
/* Per ring, since this reader was opened: records delivered, and missing by their sequence numbers. */
void reader_counts(const reader *r, uint64_t *delivered, uint64_t *missing);

/* For tests: what the reader makes of one record, and the portable form of the hash. */
int64_t reader_format(reader *r, const uint8_t *record, size_t length, char *out, size_t room);
void sha256_portable(const void *data, size_t length, uint8_t *digest);
void process_uid(const uint8_t *boot_id, uint64_t start, uint32_t pid, char *out);
