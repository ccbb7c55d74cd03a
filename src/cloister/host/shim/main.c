/*
 * What it is: the entry of cloister-shim, which is two programs in one file: `outer` stands
 * between the user's terminal and bubblewrap, `inner` is PID 1 of the sandbox.
 * What it is not: a command for people; `cloister run` and bubblewrap start it.
 */
#include "shim.h"
#include "sys.h"

#include <stdio.h>
#include <string.h>

int main(int argc, char **argv)
{
    if (argc == 3 && strcmp(argv[1], "outer") == 0)
        return outer_main(argv[2]);
    if (argc >= 4 && strcmp(argv[1], "inner") == 0)
        return inner_main(argc - 2, argv + 2);
    fputs("cloister: cloister-shim is started by `cloister run`, not by hand [shim-usage]\n"
          "  try: cloister run --help\n",
          stderr);
    return EXIT_CLOISTER;
}
