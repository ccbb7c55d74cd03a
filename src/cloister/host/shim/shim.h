/*
 * What it is: the programs main.c chooses from. What it is not: shared state; they have none.
 */
#ifndef CLOISTER_SHIM_H
#define CLOISTER_SHIM_H

/*
 * Run the outer half on the descriptor named in `text`; returns the exit code of `cloister run`. `mask`, in octal, is the
 * umask of whoever asked for a run that goes on without them; NULL: ours.
 */
int outer_main(const char *text, const char *mask);

/* The same on the descriptor itself; -1 is an error that is reported. */
int outer_run(int fd);

/* Run the inner half with its options; returns the agent's status. */
int inner_main(int count, char **options);

/* Keep a virtual machine: options, `--` and its monitor; returns the agent's status. */
int keeper_main(int count, char **options);

/* Run a service: options, `--` and its command; returns its status. */
int service_main(int count, char **options);

/* Become a program that dies with the process `parent`, which must be ours. Returns only when that fails. */
int tied_main(const char *parent, char **argv);

/* Become a program under a number that is nobody's: UID, groups, `--` and its argv. Returns only when that fails. */
int as_main(int count, char **words);

/* Keep a run's network namespace and its pasta; the channel is standard input. */
int network_main(void);

#endif
