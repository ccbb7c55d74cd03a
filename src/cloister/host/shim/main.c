/*
 * What it is: the entry of nine programs in one file: `cloister-shim outer` stands between the
 * user's terminal and bubblewrap, `cloister-shim inner` is PID 1 of the sandbox or the main process
 * of a unit, `cloister-shim service` that of a gateway's unit and `cloister-shim end` what asks it to
 * end, `cloister-shim network` that of the unit beside a run in mode `internet`, `cloister-shim keeper` PID 1 of the
 * jail around a virtual machine's monitor, `cloister-shim as` gives that a number of its own, `cloister-shim tied` ties what makes a template to its maker,
 * `cloister-shim connect` is a way out through the proxy for ssh; installed under the name `cloister` it is the front door.
 * What it is not: the command line; that is Python's.
 */
#include "client.h"
#include "connect.h"
#include "ending.h"
#include "guest_init.h"
#include "hold.h"
#include "shim.h"

#include <string.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    if (getpid() == 1 && argc > 0 && strcmp(argv[0], "/init") == 0)
        guest_init(argc);
    if ((argc == 3 || argc == 4) && strcmp(argv[1], "outer") == 0)
        return outer_main(argv[2], argv[3]);
    if (argc >= 4 && strcmp(argv[1], "inner") == 0)
        return inner_main(argc - 2, argv + 2);
    if (argc >= 4 && strcmp(argv[1], "keeper") == 0)
        return keeper_main(argc - 2, argv + 2);
    if (argc >= 4 && strcmp(argv[1], "service") == 0)
        return service_main(argc - 2, argv + 2);
    if (argc >= 5 && strcmp(argv[1], "as") == 0)
        return as_main(argc - 2, argv + 2);
    if (argc >= 4 && strcmp(argv[1], "tied") == 0)
        return tied_main(argv[2], argv + 3);
    if (argc == 3 && strcmp(argv[1], "end") == 0)
        return ending_main(argv[2]);
    if (argc == 2 && strcmp(argv[1], "network") == 0)
        return network_main();
    if (argc == 4 && strcmp(argv[1], "connect") == 0)
        return connect_main(argv[2], argv[3]);
    if (argc == 2 && strcmp(argv[1], "trial") == 0)
        return hold_trial();
    return client_main(argc, argv);
}
