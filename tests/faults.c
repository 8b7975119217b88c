/* A library to preload: makes the Nth call of one kind fail, as it would where the host runs out of something.
 *
 * fault_arm(kind, n, error) begins to count, fault_disarm() ends it and returns how many calls there were.
 * The counter is shared with forked children, so that what a child does before it executes counts as well.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#undef syscall
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

struct state {
    char kind[32];
    int nth, error, count;
};
static struct state *state;

__attribute__((constructor)) static void begin(void)
{
    state = mmap(0, sizeof *state, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
}

void fault_arm(const char *kind, int nth, int error)
{
    state->nth = nth;
    state->error = error;
    state->count = 0;
    strncpy(state->kind, kind, sizeof state->kind - 1);
}

int fault_disarm(void)
{
    state->kind[0] = 0;
    return state->count;
}

static int fails(const char *kind)
{
    if (!state || strcmp(state->kind, kind))
        return 0;
    if (__atomic_add_fetch(&state->count, 1, __ATOMIC_SEQ_CST) != state->nth)
        return 0;
    errno = state->error;
    return 1;
}

static int regular(int fd)
{
    struct stat status;
    return fstat(fd, &status) == 0 && S_ISREG(status.st_mode);
}

#define OPEN(name, real)                                                                                     \
    int name(const char *path, int flags, ...)                                                               \
    {                                                                                                        \
        va_list rest;                                                                                        \
        va_start(rest, flags);                                                                               \
        int mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, int) : 0;                                  \
        va_end(rest);                                                                                        \
        return fails("open") || (flags & O_CREAT && fails("create")) ? -1 : REAL(real)(path, flags, mode);   \
    }
#define OPENAT(name, real)                                                                                   \
    int name(int at, const char *path, int flags, ...)                                                       \
    {                                                                                                        \
        va_list rest;                                                                                        \
        va_start(rest, flags);                                                                               \
        int mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, int) : 0;                                  \
        va_end(rest);                                                                                        \
        return fails("open") || (flags & O_CREAT && fails("create")) ? -1 : REAL(real)(at, path, flags, mode); \
    }
OPEN(open, open)
OPEN(open64, open64)
OPENAT(openat, openat)
OPENAT(openat64, openat64)

#define FCNTL(name)                                                                                          \
    int name(int fd, int command, ...)                                                                       \
    {                                                                                                        \
        va_list rest;                                                                                        \
        va_start(rest, command);                                                                             \
        void *argument = va_arg(rest, void *);                                                               \
        va_end(rest);                                                                                        \
        if (command == F_DUPFD_CLOEXEC && fails("dup"))                                                      \
            return -1;                                                                                       \
        if (command == F_OFD_SETLK && ((struct flock *)argument)->l_type == F_WRLCK && fails("lock"))        \
            return -1;                                                                                       \
        return REAL(name)(fd, command, argument);                                                            \
    }
FCNTL(fcntl)
FCNTL(fcntl64)

int dup3(int old, int new, int flags) { return fails("dup3") ? -1 : REAL(dup3)(old, new, flags); }
int mkdir(const char *path, mode_t mode) { return fails("mkdir") ? -1 : REAL(mkdir)(path, mode); }
int rename(const char *from, const char *to) { return fails("rename") ? -1 : REAL(rename)(from, to); }
int pipe2(int fds[2], int flags) { return fails("pipe") ? -1 : REAL(pipe2)(fds, flags); }
int socket(int domain, int type, int protocol) { return fails("socket") ? -1 : REAL(socket)(domain, type, protocol); }
int bind(int fd, const struct sockaddr *name, socklen_t size) { return fails("bind") ? -1 : REAL(bind)(fd, name, size); }
int listen(int fd, int backlog) { return fails("listen") ? -1 : REAL(listen)(fd, backlog); }
int connect(int fd, const struct sockaddr *name, socklen_t size) { return fails("connect") ? -1 : REAL(connect)(fd, name, size); }
int accept4(int fd, struct sockaddr *name, socklen_t *size, int flags) { return fails("accept") ? -1 : REAL(accept4)(fd, name, size, flags); }
int epoll_create1(int flags) { return fails("epoll") ? -1 : REAL(epoll_create1)(flags); }
int memfd_create(const char *name, unsigned flags) { return fails("memfd") ? -1 : REAL(memfd_create)(name, flags); }
int execve(const char *path, char *const args[], char *const env[]) { return fails("execve") ? -1 : REAL(execve)(path, args, env); }
DIR *opendir(const char *path) { return fails("opendir") ? NULL : REAL(opendir)(path); }

int epoll_ctl(int epoll, int operation, int fd, struct epoll_event *event)
{
    return operation == EPOLL_CTL_ADD && fails("epoll_ctl") ? -1 : REAL(epoll_ctl)(epoll, operation, fd, event);
}

ssize_t write(int fd, const void *data, size_t size)
{
    return state && !strcmp(state->kind, "write") && regular(fd) && fails("write") ? -1 : REAL(write)(fd, data, size);
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t at)
{
    return fails("pwrite") ? -1 : REAL(pwrite)(fd, data, size, at);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at)
{
    return fails("pwrite") ? -1 : REAL(pwrite64)(fd, data, size, at);
}

int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*run)(void *), void *argument)
{
    return fails("thread") ? state->error : REAL(pthread_create)(thread, attributes, run, argument);
}

/* A library cannot pass vfork on: it returns twice. A fork is as good to its callers, only slower. */
pid_t vfork(void) { return fails("fork") ? -1 : fork(); }

long syscall(long number, ...)
{
    va_list rest;
    long a[6];
    va_start(rest, number);
    for (int place = 0; place < 6; place++)
        a[place] = va_arg(rest, long);
    va_end(rest);
    if (number == SYS_pidfd_open && fails("pidfd"))
        return -1;
    return REAL(syscall)(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
