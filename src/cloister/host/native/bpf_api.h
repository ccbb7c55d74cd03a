/* What `cloister.host._bpf` offers to Python: libbpf's own functions, and what libbpf says. Declarations only. */

struct bpf_object;
struct bpf_program;
struct bpf_map;
struct bpf_link;

struct bpf_object *loader_open(const void *image, size_t size);
struct bpf_program *bpf_object__next_program(const struct bpf_object *object, struct bpf_program *program);
struct bpf_map *bpf_object__next_map(const struct bpf_object *object, const struct bpf_map *map);
int bpf_object__load(struct bpf_object *object);
void bpf_object__close(struct bpf_object *object);
const char *bpf_program__name(const struct bpf_program *program);
int bpf_program__set_autoload(struct bpf_program *program, bool autoload);
struct bpf_link *bpf_program__attach(const struct bpf_program *program);
struct bpf_link *bpf_program__attach_cgroup(const struct bpf_program *program, int cgroup);
int bpf_link__fd(const struct bpf_link *link);
int bpf_link__destroy(struct bpf_link *link);
void bpf_link__disconnect(struct bpf_link *link);
const char *bpf_map__name(const struct bpf_map *map);
int bpf_map__fd(const struct bpf_map *map);
int bpf_map__reuse_fd(struct bpf_map *map, int fd);
int bpf_map__set_max_entries(struct bpf_map *map, uint32_t entries);
int bpf_map__set_initial_value(struct bpf_map *map, const void *data, size_t size);
int bpf_map_lookup_elem(int fd, const void *key, void *value);
int bpf_map_update_elem(int fd, const void *key, const void *value, unsigned long long flags);
int bpf_map_delete_elem(int fd, const void *key);
int libbpf_num_possible_cpus(void);
const char *libbpf_version_string(void);
/* What libbpf said since the last call, its end when it was much. */
const char *loader_said(void);
/* How often the kernel left a program out because it was running already; negative errno where it does not say. */
int64_t loader_misses(int program);
int bpf_program__fd(const struct bpf_program *program);
