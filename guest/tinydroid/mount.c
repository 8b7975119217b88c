/* mount TYPE DEVICE DIRECTORY, or mount DIRECTORY to unmount: Python has no call for either. */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>

int main(int argc, char **argv) {
    int failed = 1;
    errno = EINVAL;
    if (argc == 4) failed = mount(argv[2], argv[3], argv[1], MS_NODEV | MS_NOSUID | MS_NOEXEC, "");
    if (argc == 2) failed = umount(argv[1]);
    if (failed) fprintf(stderr, "mount %s: %s\n", argv[argc - 1], strerror(errno));
    return failed != 0;
}
