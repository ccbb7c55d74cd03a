/*
 * What it is: the program `cloister` as it is installed. What it is not: the command line; that is Python's.
 */
#ifndef CLOISTER_CLIENT_H
#define CLOISTER_CLIENT_H

/* Run a verb by the broker, or become Python's `cloister`; returns the exit code of the run. */
int client_main(int argc, char **argv);

#endif
