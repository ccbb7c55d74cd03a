/*
 * What it is: a program whose life is tied to that of its parent: SIGKILL when that dies, also in the moment before
 * this was asked for, which bubblewrap's --die-with-parent leaves open. What it is not: a jail.
 */
#define _GNU_SOURCE
#include "shim.h"
#include "sys.h"

#include <signal.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <unistd.h>

int tied_main(const char *parent, char **argv)
{
    sigset_t none;
    sigemptyset(&none);
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) < 0 || sigprocmask(SIG_SETMASK, &none, NULL) < 0)
        return EXIT_CLOISTER;
    if (getppid() != (pid_t)strtol(parent, NULL, 10))
        return EXIT_CLOISTER; /* it is dead already */
    execv(argv[0], argv);
    return EXIT_CLOISTER;
}
