/* The `sh` of the suite's images: busybox's, whose messages the suite compares, or bash if the name of a variable is no name in a shell.
 * Debian's busybox drops such variables from the environment of its children, and that of upstream's image does not. */
#include <ctype.h>
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
    (void)argc;
    for (char **variable = environ; *variable; variable++)
        if (!is_name(*variable))
            shell = "/usr/bin/bash-static";
    execv(shell, argv);
    return 127;
}
