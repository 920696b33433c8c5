/* The `sh` of the suite's images: busybox's, whose messages the suite compares, or bash. Debian's busybox drops variables whose names are no
 * names in a shell from the environment of its children, and runs its own nc, which lacks options; that of upstream's image does neither. */
#include <ctype.h>
#include <string.h>
#include <unistd.h>

extern char **environ;

static int is_name(const char *variable) {
    const char *c = variable;
    if (!isalpha((unsigned char)*c) && *c != '_')
        return 0;
    while (*c && *c != '=') {
        if (!isalnum((unsigned char)*c) && *c != '_')
            return 0;
        c++;
    }
    return 1;
}

int main(int argc, char **argv) {
    const char *shell = "/usr/bin/busybox";
    for (int i = 1; i < argc; i++)
        if (strstr(argv[i], "nc -"))
            shell = "/usr/bin/bash-static";
    for (char **variable = environ; *variable; variable++)
        if (!is_name(*variable))
            shell = "/usr/bin/bash-static";
    execv(shell, argv);
    return 127;
}
