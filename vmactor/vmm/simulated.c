// SPDX-License-Identifier: Apache-2.0
/*
 * A VMM without a guest: takes crosvm's command line, answers crosvm's control socket, and plays a script.
 *
 * For load and fault tests of a manager. The script is the kernel parameter vmactor.script, in the language of the test
 * guest's agent (guest/README.md) with some steps more (docs/simulated.md lists them all). What a guest reports goes as
 * MessagePack-RPC over unix sockets in the way of vhost-device-vsock: with `--vsock cid=N,device=DIRECTORY` host port P
 * is the socket vsock_P in that directory, and vsock takes the host's connections, which begin with "CONNECT PORT".
 *
 * There will be thousands of these, so: one thread, one poll loop, no allocation, buffers that are not touched cost
 * nothing. Nothing here blocks: a console that nobody reads holds up its step and not the control socket.
 *
 * Build it: cc -O2 -static -o vmactor-simulated-vmm simulated.c
 */
#define _GNU_SOURCE
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define NAME "vmactor-simulated-vmm"
#define VERSION "1.0.0"
#define DEFAULT_SCRIPT "started;ready;serve"
#define NO_MANAGER "MICRODROID_FAILED_TO_CONNECT_TO_VIRTUALIZATION_SERVICE"

enum {
    STEP_PORT = 5000,
    CONNECT_LIMIT_MS = 5000, /* how long the manager may take to be there */
    CONNECT_PAUSE_MS = 100,
    REPLY_LIMIT_MS = 10000, /* how long it may take to answer */
    TRACKS = 9,             /* the script, and connections that bring steps */
    CONTROLS = 8,           /* connections to the control socket */
    LINE_SIZE = 4096,
    REQUEST_SIZE = 4096,
    PAGE = 4096,
};

/* crosvm's exit statuses */
enum { SUCCESS = 0, FAILURE = 1, RESET = 32, CRASH = 33, PANIC = 34, BAD_ARGUMENTS = 35, WATCHDOG = 36 };

static struct {
    bool extended_status, balloon, boots, suspended, serving, deaf;
    int console, failure, log; /* where serial output goes; -1 is nowhere */
    int control, listener;     /* listening sockets, or -1 */
    unsigned cid;
    uint64_t memory;
    const char *vsock; /* the directory of its sockets, or NULL */
    char script[LINE_SIZE];
} vm = {.balloon = true, .console = -1, .failure = -1, .log = -1, .control = -1, .listener = -1, .memory = 256ull << 20};

static uint64_t balloon_size;
static bool balloon_inactive;

static enum { ANSWERING, SILENT, SLOW, REFUSING, GARBLING, CLOSING } mood; /* of the control socket */
static long mood_number;

static char unix_path[108]; /* the socket for the host's connections, once it is there */

static long now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000L + now.tv_nsec / 1000000L;
}

static void say(const char *format, ...) {
    char line[1024];
    va_list args;
    va_start(args, format);
    int size = vsnprintf(line, sizeof line - 1, format, args);
    va_end(args);
    if (size > (int)sizeof line - 2) size = sizeof line - 2;
    line[size++] = '\n';
    if (write(2, line, (size_t)size) < 0) return; /* there is nobody left to tell */
}

static _Noreturn void leave(int status) {
    if (*unix_path) unlink(unix_path);
    static const char *const ways[] = {"reset", "crash", "guest panic", "invalid arguments", "watchdog reset"};
    if (status >= RESET && status <= WATCHDOG) say("exiting with %s", ways[status - RESET]);
    else if (status) say("exiting with error %d", status);
    else say("exiting with success");
    bool masked = !vm.extended_status && (status == RESET || status == CRASH || status == PANIC || status == WATCHDOG);
    _exit(masked ? 0 : status);
}

#define REFUSE(status, ...) (say(NAME ": " __VA_ARGS__), leave(status))

/* ---- The command line ------------------------------------------------------------------------------------------- */

static bool number_of(const char *text, uint64_t limit, uint64_t *value) {
    char *end;
    errno = 0;
    *value = strtoull(text, &end, 0);
    return isdigit((unsigned char)*text) && !*end && !errno && *value <= limit;
}

/* One key of a list such as "type=file,path=/a,num=2"; the first key's name may be left out. */
struct pair {
    char key[32], value[256];
};

static bool next_pair(const char **at, const char *first, struct pair *pair) {
    if (!**at) return false;
    size_t size = strcspn(*at, ","), key = strcspn(*at, "=,");
    const char *value = *at, *name = first ? first : "";
    if (key < size) value = *at + key + 1;
    snprintf(pair->value, sizeof pair->value, "%.*s", (int)(size - (size_t)(value - *at)), value);
    if (key < size || !first) snprintf(pair->key, sizeof pair->key, "%.*s", (int)key, *at);
    else snprintf(pair->key, sizeof pair->key, "%s", name);
    if (key == size && !first) strcpy(pair->value, "true");
    *at += size + ((*at)[size] == ',');
    return true;
}

/* Files are used as crosvm uses them: an inherited descriptor must be there, anything else must be readable. */
static int descriptor_of(const char *flag, const char *path) {
    const char *start = "/proc/self/fd/";
    uint64_t number;
    if (!strncmp(path, start, strlen(start)) && number_of(path + strlen(start), INT32_MAX, &number)) {
        if (fcntl((int)number, F_GETFD) < 0) REFUSE(FAILURE, "%s %s: %s", flag, path, strerror(errno));
        return (int)number;
    }
    if (access(path, R_OK)) REFUSE(FAILURE, "%s %s: %s", flag, path, strerror(errno));
    return -1;
}

static void take_serial(const char *list) {
    struct pair pair;
    uint64_t number = 1;
    bool file = false, virtio = false;
    int fd = -1;
    for (bool first = true; next_pair(&list, first ? "type" : NULL, &pair); first = false) {
        if (!strcmp(pair.key, "type")) {
            file = !strcmp(pair.value, "file");
            if (!file && strcmp(pair.value, "sink")) REFUSE(BAD_ARGUMENTS, "--serial: type %s is unknown", pair.value);
        } else if (!strcmp(pair.key, "hardware")) {
            virtio = !strcmp(pair.value, "virtio-console");
            if (!virtio && strcmp(pair.value, "serial"))
                REFUSE(BAD_ARGUMENTS, "--serial: hardware %s is unknown", pair.value);
        } else if (!strcmp(pair.key, "num")) {
            if (!number_of(pair.value, 4, &number) || !number) REFUSE(BAD_ARGUMENTS, "--serial: num=%s", pair.value);
        } else if (!strcmp(pair.key, "path")) {
            fd = descriptor_of("--serial", pair.value);
            if (fd < 0 && (fd = open(pair.value, O_WRONLY | O_APPEND | O_CLOEXEC | O_NOCTTY)) < 0)
                REFUSE(FAILURE, "--serial %s: %s", pair.value, strerror(errno));
        } else if (strcmp(pair.key, "console") && strcmp(pair.key, "earlycon")) {
            REFUSE(BAD_ARGUMENTS, "--serial: key %s is unknown", pair.key);
        }
    }
    if (!file) return;
    if (fd < 0) REFUSE(FAILURE, "--serial: type=file needs a path");
    /* Nobody writes here but this process: the manager closes its copy of a write end. */
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
    if (virtio && number == 1) vm.console = fd;
    if (!virtio && number == 1 && vm.console < 0) vm.console = fd;
    if (!virtio && number == 2) vm.failure = fd;
    if (virtio && number == 3) vm.log = fd;
}

static void take_vsock(const char *list) {
    struct pair pair;
    uint64_t cid = 0;
    static char path[256];
    for (bool first = true; next_pair(&list, first ? "cid" : NULL, &pair); first = false) {
        if (!strcmp(pair.key, "cid")) {
            if (!number_of(pair.value, UINT32_MAX, &cid)) REFUSE(BAD_ARGUMENTS, "--vsock: cid=%s", pair.value);
        } else if (!strcmp(pair.key, "device")) {
            descriptor_of("--vsock", pair.value);
            vm.vsock = strcpy(path, pair.value);
        } else {
            REFUSE(BAD_ARGUMENTS, "--vsock: key %s is unknown", pair.key);
        }
    }
    if (cid < 3) REFUSE(BAD_ARGUMENTS, "--vsock: a guest's CID is 3 or more");
    vm.cid = (unsigned)cid;
}

static void take_memory(const char *list) {
    struct pair pair;
    uint64_t mib;
    while (next_pair(&list, "size", &pair)) {
        if (strcmp(pair.key, "size")) REFUSE(BAD_ARGUMENTS, "--mem: key %s is unknown", pair.key);
        if (!number_of(pair.value, INT32_MAX, &mib) || !mib) REFUSE(BAD_ARGUMENTS, "--mem: size=%s", pair.value);
        vm.memory = mib << 20;
    }
}

static void take_disk(const char *list) {
    struct pair pair;
    for (bool first = true; next_pair(&list, first ? "path" : NULL, &pair); first = false)
        if (!strcmp(pair.key, "path")) descriptor_of("--block", pair.value);
}

/* The kernel cuts its command line at spaces outside double quotes and knows no other quoting; the first one counts. */
static void take_script(const char *params) {
    const char *name = "vmactor.script=";
    bool quoted = false;
    size_t used = 0;
    if (*vm.script) return;
    char word[sizeof vm.script];
    for (const char *at = params;; at++) {
        if (*at == '"') {
            quoted = !quoted;
        } else if (!*at || (isspace((unsigned char)*at) && !quoted)) {
            word[used] = 0;
            if (!strncmp(word, name, strlen(name))) {
                strcpy(vm.script, word + strlen(name));
                return;
            }
            if (!*at) return;
            used = 0;
        } else if (used < sizeof word - 1) {
            word[used++] = *at;
        }
    }
}

/* What a flag takes and what becomes of it; a flag that is not here is one that this build of crosvm lacks. */
static const struct flag {
    const char *name, *brief;
    enum { SWITCH, VALUE, REPEATED } kind;
} flags[] = {
    {"--balloon-page-reporting", NULL, SWITCH}, {"--bios", NULL, VALUE}, {"--block", "-b", REPEATED},
    {"--cid", NULL, VALUE}, {"--cpus", "-c", VALUE}, {"--disable-sandbox", NULL, SWITCH}, {"--disk", "-d", REPEATED},
    {"--host-cpu-topology", NULL, SWITCH}, {"--hugepages", NULL, SWITCH}, {"--initrd", "-i", VALUE},
    {"--mem", "-m", VALUE}, {"--name", NULL, VALUE}, {"--no-balloon", NULL, SWITCH}, {"--no-rng", NULL, SWITCH},
    {"--no-usb", NULL, SWITCH}, {"--params", "-p", REPEATED}, {"--protected-vm", NULL, SWITCH},
    {"--protected-vm-with-firmware", NULL, VALUE}, {"--rwdisk", NULL, REPEATED}, {"--serial", NULL, REPEATED},
    {"--socket", "-s", VALUE}, {"--suspended", NULL, SWITCH}, {"--swiotlb", NULL, VALUE}, {"--unmap-guest-memory-on-fork", NULL, SWITCH},
    {"--vsock", NULL, VALUE},
};

static void take_flag(const struct flag *flag, const char *value) {
    const char *name = flag->name;
    uint64_t number;
    if (!strcmp(name, "--serial")) take_serial(value);
    else if (!strcmp(name, "--vsock")) take_vsock(value);
    else if (!strcmp(name, "--mem")) take_memory(value);
    else if (!strcmp(name, "--params")) take_script(value);
    else if (!strcmp(name, "--no-balloon")) vm.balloon = false;
    else if (!strcmp(name, "--suspended")) vm.suspended = true;
    else if (!strcmp(name, "--block") || !strcmp(name, "--disk") || !strcmp(name, "--rwdisk")) take_disk(value);
    else if (!strcmp(name, "--initrd") || !strcmp(name, "--protected-vm-with-firmware")) descriptor_of(name, value);
    else if (!strcmp(name, "--bios")) descriptor_of(name, value), vm.boots = true;
    else if (!strcmp(name, "--socket")) {
        if ((vm.control = descriptor_of(name, value)) < 0) REFUSE(FAILURE, "--socket: give a listening descriptor");
    } else if (!strcmp(name, "--cid")) {
        if (!number_of(value, UINT32_MAX, &number)) REFUSE(BAD_ARGUMENTS, "--cid: %s is no number", value);
        vm.cid = (unsigned)number;
    }
}

static void print_help(void) {
    puts("Usage: " NAME " [--extended-status] [--log-level SPEC] [--no-syslog] run [OPTIONS] KERNEL\n");
    for (size_t i = 0; i < sizeof flags / sizeof *flags; i++)
        printf("  %s%s%s%s\n", flags[i].brief ? flags[i].brief : "", flags[i].brief ? ", " : "", flags[i].name,
               flags[i].kind == SWITCH ? "" : " VALUE");
    fflush(stdout);
    _exit(0);
}

static void parse(int argc, char **argv) {
    int at = 1;
    bool protected = false, given[sizeof flags / sizeof *flags] = {false};
    for (; at < argc && *argv[at] == '-'; at++) {
        if (!strcmp(argv[at], "--extended-status")) vm.extended_status = true;
        else if (!strcmp(argv[at], "--log-level") || !strcmp(argv[at], "--syslog-tag")) at++;
        else if (strcmp(argv[at], "--no-syslog")) REFUSE(BAD_ARGUMENTS, "unknown option %s", argv[at]);
    }
    if (at < argc && !strcmp(argv[at], "version")) {
        puts(NAME " " VERSION);
        fflush(stdout);
        _exit(0);
    }
    if (at >= argc || strcmp(argv[at++], "run")) REFUSE(BAD_ARGUMENTS, "the commands are run and version");
    for (; at < argc; at++) {
        char *name = argv[at], *value = NULL;
        if (*name != '-' || !name[1]) {
            if (vm.boots) REFUSE(FAILURE, "more than one kernel, or a kernel beside --bios: %s", name);
            descriptor_of("the kernel", name);
            vm.boots = true;
            continue;
        }
        if (!strcmp(name, "-h") || !strcmp(name, "--help")) print_help();
        if ((value = strchr(name, '='))) *value++ = 0;
        size_t which = 0, count = sizeof flags / sizeof *flags;
        while (which < count && strcmp(flags[which].name, name) &&
               (!flags[which].brief || strcmp(flags[which].brief, name)))
            which++;
        if (which == count) REFUSE(BAD_ARGUMENTS, "unknown option %s", name);
        const struct flag *flag = &flags[which];
        if (given[which] && flag->kind != REPEATED) REFUSE(BAD_ARGUMENTS, "%s is given twice", name);
        given[which] = true;
        if (flag->kind == SWITCH && value) REFUSE(BAD_ARGUMENTS, "%s takes no value", name);
        if (flag->kind != SWITCH && !value && !(value = argv[++at])) REFUSE(BAD_ARGUMENTS, "%s needs a value", name);
        if (!strncmp(flag->name, "--protected-vm", strlen("--protected-vm"))) {
            if (protected) REFUSE(FAILURE, "two ways of protection");
            protected = true;
        }
        take_flag(flag, value);
    }
    if (!vm.boots) REFUSE(FAILURE, "no kernel and no --bios");
    if (!*vm.script) strcpy(vm.script, DEFAULT_SCRIPT);
}

/* ---- Sockets ---------------------------------------------------------------------------------------------------- */

static bool unix_address(struct sockaddr_un *address, const char *suffix) {
    *address = (struct sockaddr_un){.sun_family = AF_UNIX};
    int size = snprintf(address->sun_path, sizeof address->sun_path, "%s/vsock%s", vm.vsock, suffix);
    if (size < (int)sizeof address->sun_path) return true;
    errno = ENAMETOOLONG;
    return false;
}

static int dial_manager(void) {
    struct sockaddr_un address;
    char suffix[16];
    snprintf(suffix, sizeof suffix, "_%u", vm.cid);
    if (!unix_address(&address, suffix)) return -1;
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address) == 0) return fd;
    int error = errno;
    close(fd);
    errno = error;
    return -1;
}

/* Bound before the script begins: what the host sends as soon as it hears "ready" must not be refused. */
static void listen_for_steps(void) {
    struct sockaddr_un address;
    if (!vm.vsock || !strstr(vm.script, "serve")) return;
    vm.listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (vm.listener < 0 || !unix_address(&address, "") ||
        bind(vm.listener, (struct sockaddr *)&address, sizeof address))
        REFUSE(FAILURE, "%s/vsock: %s", vm.vsock, strerror(errno));
    strcpy(unix_path, address.sun_path);
    if (listen(vm.listener, TRACKS)) REFUSE(FAILURE, "%s/vsock: %s", vm.vsock, strerror(errno));
}

/* ---- Tracks: the script, and each connection that brings steps; a track carries out one step at a time ---------- */

enum state { FREE, NEXT, SLEEPING, DIALLING, AWAITING, WRITING, RESTING };

static struct track {
    enum state state;
    bool greeted;  /* the connection's CONNECT has been answered */
    int fd;        /* the connection; -1 in the script */
    int rpc;       /* a connection to the manager, kept for as long as one report follows the other */
    int out;       /* where the text goes while WRITING */
    long wake;     /* when to go on, or to give up */
    long again;    /* when to dial once more */
    size_t have, size, sent;
    unsigned char id;
    char step[16]; /* the step's name */
    char lines[LINE_SIZE];
    char text[LINE_SIZE]; /* a request, a text on its way, or an answer */
    unsigned char reply[1024];
    size_t replied;
} tracks[TRACKS];

enum outcome { DONE, FAILED, LATER };

static enum outcome fail(struct track *track, const char *why) {
    track->size = (size_t)snprintf(track->text, sizeof track->text, "%s", why);
    return FAILED;
}

static enum outcome done(struct track *track) {
    track->size = 0;
    return DONE;
}

static enum outcome wait_until(struct track *track, enum state state, long deadline) {
    track->state = state;
    track->wake = deadline;
    return LATER;
}

static void hang_up(struct track *track) {
    if (track->rpc >= 0) close(track->rpc);
    track->rpc = -1;
}

static enum outcome go_on_writing(struct track *track) {
    while (track->sent < track->size) {
        ssize_t written = write(track->out, track->text + track->sent, track->size - track->sent);
        if (written < 0 && errno == EAGAIN) return wait_until(track, WRITING, 0);
        if (written < 0) return fail(track, strerror(errno));
        track->sent += (size_t)written;
    }
    if (!strcmp(track->step, "spam")) return track->sent = 0, wait_until(track, WRITING, 0);
    return done(track);
}

static enum outcome write_text(struct track *track, int fd, const char *text, const char *end) {
    if (fd < 0) return done(track); /* as into a sink */
    track->size = (size_t)snprintf(track->text, sizeof track->text, "%s%s", text, end);
    if (track->size >= sizeof track->text) track->size = sizeof track->text - 1;
    track->sent = 0;
    track->out = fd;
    return go_on_writing(track);
}

/* ---- Reports to the manager: MessagePack-RPC --------------------------------------------------------------------- */

static void pack(struct track *track, const void *data, size_t size) {
    memcpy(track->text + track->size, data, size); /* a line and its head fit by their sizes */
    track->size += size;
}

static void pack_number(struct track *track, unsigned char tag, uint32_t value, size_t size) {
    pack(track, &tag, 1);
    while (size--) pack(track, &(unsigned char){(unsigned char)(value >> 8 * size)}, 1);
}

static void pack_text(struct track *track, const char *text) {
    size_t size = strnlen(text, LINE_SIZE - 64);
    if (size < 32) pack_number(track, 0xa0 | (unsigned char)size, 0, 0);
    else pack_number(track, 0xda, (uint32_t)size, 2);
    pack(track, text, size);
}

static void begin_request(struct track *track, const char *method, unsigned char params) {
    track->id = (unsigned char)((track->id + 1) & 0x7f);
    track->size = 0;
    pack(track, (unsigned char[]){0x94, 0x00, track->id}, 3);
    pack_text(track, method);
    pack_number(track, 0x90 | params, 0, 0);
}

static bool send_request(struct track *track) {
    track->replied = 0;
    return send(track->rpc, track->text, track->size, MSG_NOSIGNAL | MSG_DONTWAIT) == (ssize_t)track->size;
}

static enum outcome await_reply(struct track *track) { return wait_until(track, AWAITING, now_ms() + REPLY_LIMIT_MS); }

static enum outcome dial(struct track *track) {
    if ((track->rpc = dial_manager()) >= 0 && send_request(track)) return await_reply(track);
    hang_up(track);
    long now = now_ms();
    if (now < track->wake) {
        track->again = now + CONNECT_PAUSE_MS;
        track->state = DIALLING;
        return LATER;
    }
    say(NAME ": no manager at host port %u: %s", vm.cid, strerror(errno));
    if (vm.failure >= 0 && write(vm.failure, NO_MANAGER, strlen(NO_MANAGER)) < 0) say(NAME ": no failure port");
    leave(SUCCESS);
}

static enum outcome report(struct track *track) {
    if (!vm.vsock) return fail(track, "no vsock: give --vsock cid=N,device=DIRECTORY");
    if (track->rpc >= 0 && send_request(track)) return await_reply(track);
    hang_up(track); /* that manager is gone, and there may be another one */
    track->wake = now_ms() + CONNECT_LIMIT_MS;
    return dial(track);
}

/* [1, id, nil, nil], or [1, id, [code, text, ...], nil]: then the text is all that matters, and the connection goes. */
static enum outcome read_reply(struct track *track) {
    ssize_t received =
        recv(track->rpc, track->reply + track->replied, sizeof track->reply - track->replied, MSG_DONTWAIT);
    if (received < 0 && errno == EAGAIN) return LATER;
    if (received <= 0) {
        hang_up(track);
        return fail(track, "the manager closed the connection without an answer");
    }
    track->replied += (size_t)received;
    const unsigned char *at = track->reply, *end = at + track->replied;
    if (end - at < 5) return LATER;
    if (at[0] == 0x94 && at[1] == 1 && at[2] == track->id && at[3] == 0xc0) return done(track);
    bool ours = at[0] == 0x94 && at[1] == 1 && at[2] == track->id && at[3] == 0x93;
    size_t code = at[4] < 0x80 || at[4] >= 0xe0 ? 1 : at[4] == 0xd0 ? 2 : at[4] == 0xd1 ? 3 : 5;
    at += 4 + code;
    size_t head = 1, size = 0;
    bool full = track->replied == sizeof track->reply;
    if (ours && end - at < 3) return full ? fail(track, "refused") : LATER;
    if (*at >= 0xa0 && *at <= 0xbf) size = *at & 31;
    else if (*at == 0xd9) head = 2, size = at[1];
    else if (*at == 0xda) head = 3, size = (size_t)at[1] << 8 | at[2];
    else ours = false;
    if (ours && (size_t)(end - at) < head + size && !full) return LATER;
    hang_up(track);
    if (!ours) return fail(track, "the manager's answer is not MessagePack-RPC");
    size_t there = (size_t)(end - at) - head;
    track->size = (size_t)snprintf(track->text, sizeof track->text, "refused: %.*s",
                                   (int)(size < there ? size : there), (const char *)at + head);
    return FAILED;
}

/* ---- Steps: each gets the rest of its line ------------------------------------------------------------------------ */

static enum outcome do_started(struct track *track, char *rest) {
    (void)rest;
    begin_request(track, "notifyPayloadStarted", 0);
    return report(track);
}

static enum outcome do_ready(struct track *track, char *rest) {
    (void)rest;
    begin_request(track, "notifyPayloadReady", 0);
    return report(track);
}

static enum outcome do_finished(struct track *track, char *rest) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    uint32_t microseconds = (uint32_t)(now.tv_sec * 1000000ull + (uint64_t)now.tv_nsec / 1000) & INT32_MAX;
    begin_request(track, "notifyPayloadFinished", 1);
    pack_number(track, 0xd2, strcmp(rest, "clock") ? (uint32_t)strtol(rest, NULL, 0) : microseconds, 4);
    return report(track);
}

static enum outcome do_error(struct track *track, char *rest) {
    begin_request(track, "notifyError", 2);
    pack_number(track, 0xd2, (uint32_t)strtol(rest, &rest, 0), 4);
    pack_text(track, rest + (*rest == ' '));
    return report(track);
}

/* The answer to a step that ends the machine must leave first. */
static _Noreturn void end(struct track *track, int status) {
    if (track->fd >= 0) send(track->fd, "ok\n", 3, MSG_NOSIGNAL | MSG_DONTWAIT);
    leave(status);
}

static enum outcome do_end(struct track *track, char *rest) {
    static const struct {
        const char *step;
        int status;
    } ends[] = {{"poweroff", SUCCESS}, {"reboot", RESET}, {"crash", CRASH}, {"panic", PANIC}, {"watchdog", WATCHDOG}};
    (void)rest;
    for (size_t i = 0;; i++)
        if (!strcmp(ends[i].step, track->step)) end(track, ends[i].status);
}

static enum outcome do_exit(struct track *track, char *rest) {
    uint64_t status;
    if (!number_of(rest, 255, &status)) return fail(track, "exit takes a status from 0 to 255");
    end(track, (int)status);
}

static enum outcome do_signal(struct track *track, char *rest) {
    uint64_t number;
    if (!number_of(rest, 64, &number) || !number) return fail(track, "signal takes a number from 1 to 64");
    setrlimit(RLIMIT_CORE, &(struct rlimit){0, 0});
    signal((int)number, SIG_DFL);
    raise((int)number);
    return done(track); /* some signals end nothing, and one that stops may be followed by SIGCONT */
}

static enum outcome do_ignore(struct track *track, char *rest) {
    uint64_t number;
    if (!number_of(rest, 64, &number) || signal((int)number, SIG_IGN) == SIG_ERR)
        return fail(track, "ignore takes the number of a signal that can be ignored");
    return done(track);
}

static enum outcome do_hang(struct track *track, char *rest) {
    (void)rest;
    return wait_until(track, RESTING, 0);
}

static enum outcome do_deaf(struct track *track, char *rest) {
    (void)rest;
    vm.deaf = true;
    return done(track);
}

static enum outcome do_sleep(struct track *track, char *rest) {
    uint64_t ms;
    if (!number_of(rest, UINT32_MAX, &ms)) return fail(track, "sleep takes milliseconds");
    return wait_until(track, SLEEPING, now_ms() + (long)ms);
}

static enum outcome do_write(struct track *track, char *rest) {
    bool failure = !strcmp(track->step, "failure"), log = !strcmp(track->step, "log");
    int fd = failure ? vm.failure : log ? vm.log : !strcmp(track->step, "stderr") ? 2 : vm.console;
    return write_text(track, fd, rest, failure ? "" : "\n");
}

static enum outcome do_spam(struct track *track, char *rest) {
    (void)rest;
    if (vm.console < 0) return fail(track, "no console");
    for (size_t i = 0; i < sizeof track->text; i++) track->text[i] = i % 80 == 79 ? '\n' : (char)('a' + i % 26);
    track->size = sizeof track->text;
    track->sent = 0;
    track->out = vm.console;
    return wait_until(track, WRITING, 0);
}

static enum outcome do_echo(struct track *track, char *rest) {
    track->size = (size_t)snprintf(track->text, sizeof track->text, "%s", rest);
    return DONE;
}

static enum outcome do_cid(struct track *track, char *rest) {
    (void)rest;
    track->size = (size_t)snprintf(track->text, sizeof track->text, "%u", vm.cid);
    return DONE;
}

static enum outcome do_serve(struct track *track, char *rest) {
    (void)rest;
    if (track->fd >= 0) return fail(track, "already serving");
    if (vm.listener < 0) return fail(track, "no vsock: give --vsock cid=N,device=DIRECTORY");
    vm.serving = true;
    return done(track);
}

static enum outcome do_control(struct track *track, char *rest) {
    static const char *const moods[] = {"answer", "silent", "slow", "refuse", "garble", "close"};
    size_t size = strcspn(rest, " ");
    for (size_t i = 0; i < sizeof moods / sizeof *moods; i++)
        if (strlen(moods[i]) == size && !strncmp(moods[i], rest, size)) {
            mood = (int)i;
            mood_number = strtol(rest + size, NULL, 10);
            return done(track);
        }
    return fail(track, "control takes answer, silent, slow MS, refuse ERRNO, garble or close");
}

static enum outcome do_balloon(struct track *track, char *rest) {
    balloon_inactive = !strcmp(rest, "inactive");
    if (!balloon_inactive && strcmp(rest, "active")) return fail(track, "balloon takes active or inactive");
    return done(track);
}

static const struct step {
    const char *name;
    enum outcome (*act)(struct track *track, char *rest);
    bool reports;
} steps[] = {
    {"balloon", do_balloon, false}, {"cid", do_cid, false}, {"control", do_control, false},
    {"crash", do_end, false}, {"deaf", do_deaf, false}, {"echo", do_echo, false}, {"error", do_error, true},
    {"exit", do_exit, false}, {"failure", do_write, false}, {"finished", do_finished, true},
    {"hang", do_hang, false}, {"ignore", do_ignore, false}, {"log", do_write, false}, {"panic", do_end, false},
    {"poweroff", do_end, false}, {"print", do_write, false}, {"ready", do_ready, true},
    {"reboot", do_end, false}, {"serve", do_serve, false}, {"signal", do_signal, false},
    {"sleep", do_sleep, false}, {"spam", do_spam, false}, {"started", do_started, true},
    {"stderr", do_write, false}, {"watchdog", do_end, false},
};

static const struct step *step_of(const char *line) {
    size_t size = strcspn(line, " ;");
    for (size_t i = 0; i < sizeof steps / sizeof *steps; i++)
        if (strlen(steps[i].name) == size && !strncmp(steps[i].name, line, size)) return &steps[i];
    return NULL;
}

/* A script that is wrong would measure something else than was meant, so it is refused as a whole. */
static void check_script(void) {
    for (const char *at = vm.script; *at; at += strcspn(at, ";"), at += *at == ';') {
        at += strspn(at, " ");
        if (*at && *at != ';' && !step_of(at)) {
            char name[32];
            snprintf(name, sizeof name, "%.*s", (int)strcspn(at, " ;"), at);
            REFUSE(FAILURE, "vmactor.script: unknown step %s; docs/simulated.md lists them", name);
        }
    }
}

static void drop(struct track *track) {
    hang_up(track);
    close(track->fd);
    track->state = FREE;
}

/* What a step answers goes to its connection; in the script, a complaint or an answer goes to the console. */
static void finish_step(struct track *track, enum outcome outcome) {
    char line[LINE_SIZE + 64];
    track->state = NEXT;
    int size = (int)track->size < LINE_SIZE ? (int)track->size : LINE_SIZE - 1;
    const char *verdict = outcome == DONE ? "ok" : "error", *gap = size ? " " : "";
    int total = track->fd >= 0 ? snprintf(line, sizeof line, "%s%s%.*s\n", verdict, gap, size, track->text)
                               : snprintf(line, sizeof line, "simulated: %s: %s%s%.*s\n", track->step, verdict, gap,
                                          size, track->text);
    if (track->fd >= 0) {
        if (send(track->fd, line, (size_t)total, MSG_NOSIGNAL | MSG_DONTWAIT) != total) drop(track);
    } else if (outcome == FAILED || size) {
        if (vm.console >= 0 && write(vm.console, line, (size_t)total) < 0) return; /* full: the line is lost */
    }
}

/* Takes the next line out of a track's buffer; NULL if there is none yet. */
static char *next_line(struct track *track) {
    static char line[LINE_SIZE];
    char *end = memchr(track->lines, track->fd < 0 ? ';' : '\n', track->have);
    size_t size = end ? (size_t)(end - track->lines) : track->have, used = end ? size + 1 : size;
    if (!end && (track->fd >= 0 || !track->have)) return NULL;
    memcpy(line, track->lines, size);
    line[size] = 0;
    track->have -= used;
    memmove(track->lines, track->lines + used, track->have);
    return line + strspn(line, " ");
}

static void greet(struct track *track, const char *line) {
    static const char answer[] = "OK 1024\n";
    unsigned port;
    track->greeted = sscanf(line, "CONNECT %u", &port) == 1 && port == STEP_PORT;
    if (!track->greeted || send(track->fd, answer, sizeof answer - 1, MSG_NOSIGNAL | MSG_DONTWAIT) < 0) drop(track);
}

static void advance(struct track *track) {
    while (track->state == NEXT) {
        char *line = next_line(track);
        if (!line && track->fd < 0) {
            if (!vm.serving) leave(SUCCESS);
            track->state = RESTING;
        }
        if (!line) break;
        if (track->fd >= 0 && !track->greeted) {
            greet(track, line);
            continue;
        }
        if (!*line) continue;
        const struct step *step = step_of(line);
        char *rest = line + strcspn(line, " ");
        snprintf(track->step, sizeof track->step, "%.*s", (int)(rest - line), line);
        if (*rest) rest++;
        if (!step || !step->reports) hang_up(track);
        enum outcome outcome = step ? step->act(track, rest) : fail(track, "unknown step");
        if (outcome != LATER) finish_step(track, outcome);
    }
    if (track->state == NEXT || track->state == RESTING) hang_up(track);
}

static void wake(struct track *track, short events) {
    enum outcome outcome = LATER;
    long now = now_ms();
    switch (track->state) {
    case SLEEPING:
        if (now >= track->wake) outcome = done(track);
        break;
    case DIALLING:
        if (now >= track->again) outcome = dial(track);
        break;
    case AWAITING:
        if (events) outcome = read_reply(track);
        if (outcome == LATER && now >= track->wake) {
            hang_up(track);
            outcome = fail(track, "the manager did not answer in time");
        }
        break;
    case WRITING:
        if (events) outcome = go_on_writing(track);
        break;
    case NEXT:
        if (events && track->fd >= 0) {
            ssize_t received = recv(track->fd, track->lines + track->have, sizeof track->lines - track->have, 0);
            if (received > 0) track->have += (size_t)received;
            else if (received == 0 || errno != EAGAIN) drop(track); /* also a line that fills the whole buffer */
        }
        break;
    default:
        break;
    }
    if (outcome != LATER) finish_step(track, outcome);
    advance(track);
}

static void accept_steps(void) {
    for (struct track *track = tracks + 1; track < tracks + TRACKS; track++) {
        if (track->state != FREE) continue;
        int fd = accept4(vm.listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
        if (fd < 0) return;
        track->state = NEXT;
        track->greeted = false;
        track->fd = fd;
        track->rpc = -1;
        track->have = 0;
        return;
    }
}

/* ---- The control socket: crosvm's JSON, a packet each way ---------------------------------------------------------- */

static struct control {
    bool open;
    int fd;
    long wake;
    size_t size; /* of a request that waits to be carried out, else 0 */
    char request[REQUEST_SIZE];
} controls[CONTROLS];

struct json {
    const char *at;
};

static bool json_byte(struct json *json, char byte) {
    json->at += strspn(json->at, " \t\r\n");
    if (*json->at != byte) return false;
    json->at++;
    return true;
}

static bool json_string(struct json *json, char *text, size_t room) {
    size_t used = 0;
    if (!json_byte(json, '"')) return false;
    for (; *json->at && *json->at != '"'; json->at++) {
        if (*json->at == '\\' && !*++json->at) return false;
        if (used + 1 < room) text[used++] = *json->at;
    }
    text[used] = 0;
    return json_byte(json, '"');
}

static bool json_word(struct json *json, const char *word) {
    json->at += strspn(json->at, " \t\r\n");
    if (strncmp(json->at, word, strlen(word))) return false;
    json->at += strlen(word);
    return true;
}

static bool json_number(struct json *json, uint64_t *number) {
    char *end;
    json->at += strspn(json->at, " \t\r\n");
    if (!isdigit((unsigned char)*json->at)) return false;
    *number = strtoull(json->at, &end, 10);
    json->at = end;
    return true;
}

static bool json_skip(struct json *json, int depth) {
    char text[8];
    if (depth > 8) return false;
    bool object = json_byte(json, '{');
    if (object || json_byte(json, '[')) {
        char closing = object ? '}' : ']';
        if (json_byte(json, closing)) return true;
        do {
            if (object && !(json_string(json, text, sizeof text) && json_byte(json, ':'))) return false;
            if (!json_skip(json, depth + 1)) return false;
        } while (json_byte(json, ','));
        return json_byte(json, closing);
    }
    if (*json->at == '"') return json_string(json, text, sizeof text);
    size_t size = strspn(json->at, "+-.0123456789abcdefghijklmnopqrstuvwxyzE");
    json->at += size;
    return size > 0;
}

/* An externally tagged variant: "Name", {"Name":null}, or {"Name":...}, which leaves the reader at its contents. */
static bool json_variant(struct json *json, char *name, size_t room, bool *unit) {
    *unit = true;
    if (!json_byte(json, '{')) return json_string(json, name, room);
    if (!json_string(json, name, room) || !json_byte(json, ':')) return false;
    if (json_word(json, "null")) return json_byte(json, '}');
    *unit = false;
    return true;
}

static int answer_text(char *reply, size_t room, const char *format, ...) {
    va_list args;
    va_start(args, format);
    int size = vsnprintf(reply, room, format, args);
    va_end(args);
    return size;
}

static int balloon_stats(char *reply, size_t room) {
    unsigned long long total = vm.memory, spare = total - balloon_size;
    return answer_text(reply, room,
                       "{\"BalloonStats\":{\"stats\":{\"swap_in\":0,\"swap_out\":0,\"major_faults\":0,"
                       "\"minor_faults\":0,\"free_memory\":%llu,\"total_memory\":%llu,\"available_memory\":%llu,"
                       "\"disk_caches\":0,\"hugetlb_allocations\":0,\"hugetlb_failures\":0,\"shared_memory\":null,"
                       "\"unevictable_memory\":null},\"balloon_actual\":%llu}}",
                       spare / 4 * 3, total, spare / 4 * 3, (unsigned long long)balloon_size);
}

static int adjust_balloon(struct json *json, char *reply, size_t room) {
    char key[32];
    uint64_t size = 0;
    bool sized = false, waits = false;
    if (!json_byte(json, '{')) return -1;
    do {
        if (!json_string(json, key, sizeof key) || !json_byte(json, ':')) return -1;
        if (!strcmp(key, "num_bytes")) {
            if (!(sized = json_number(json, &size))) return -1;
        } else if (!strcmp(key, "wait_for_success")) {
            if (!(waits = json_word(json, "true") || json_word(json, "false"))) return -1;
        } else if (!json_skip(json, 0)) {
            return -1;
        }
    } while (json_byte(json, ','));
    if (!json_byte(json, '}') || !sized || !waits) return -1;
    if (!vm.balloon || balloon_inactive) return answer_text(reply, room, "{\"Err\":%d}", vm.balloon ? ENOTCONN : EOPNOTSUPP);
    if (size > vm.memory) size = vm.memory;
    balloon_size = size / PAGE * PAGE;
    return answer_text(reply, room, "\"Ok\"");
}

static int balloon_command(struct json *json, char *reply, size_t room) {
    char name[32];
    bool unit;
    int size;
    if (!json_variant(json, name, sizeof name, &unit)) return -1;
    if (unit && !strcmp(name, "Stats")) {
        size = !vm.balloon || balloon_inactive
                   ? answer_text(reply, room, "{\"Err\":%d}", vm.balloon ? ENOTCONN : EOPNOTSUPP)
                   : balloon_stats(reply, room);
    } else if (!unit && !strcmp(name, "Adjust")) {
        size = adjust_balloon(json, reply, room);
        if (!json_byte(json, '}')) return -1;
    } else {
        return -1;
    }
    return json_byte(json, '}') ? size : -1; /* of {"BalloonCommand": ...} */
}

/* Carries a request out; the reply's size, or -1 for a request that crosvm would log and never answer. */
static int carry_out(const char *request, char *reply, size_t room, bool *exits) {
    struct json json = {request};
    char name[32];
    bool unit;
    int size = -1;
    if (!json_variant(&json, name, sizeof name, &unit)) return -1;
    if (!unit) {
        if (strcmp(name, "BalloonCommand")) return -1;
        size = balloon_command(&json, reply, room);
        if (json.at[strspn(json.at, " \t\r\n")]) return -1;
        return size;
    }
    if (json.at[strspn(json.at, " \t\r\n")]) return -1;
    if (!strcmp(name, "Exit")) {
        *exits = true;
    } else if (!strcmp(name, "SuspendVcpus") || !strcmp(name, "SuspendVm")) {
        vm.suspended = true;
    } else if (!strcmp(name, "ResumeVcpus") || !strcmp(name, "ResumeVm")) {
        vm.suspended = false;
    } else if (!strcmp(name, "VcpuPidTid")) {
        return answer_text(reply, room, "{\"VcpuPidTidResponse\":{\"pid_tid_map\":{\"0\":[%d,%d]}}}", getpid(), getpid());
    } else if (!strcmp(name, "Powerbtn")) {
        *exits = !vm.deaf;
    } else if (strcmp(name, "Sleepbtn") && strcmp(name, "MakeRT")) {
        return -1;
    }
    return answer_text(reply, room, "\"Ok\"");
}

static void close_control(struct control *control) {
    close(control->fd);
    control->open = false;
    control->size = 0;
}

static void answer(struct control *control) {
    char reply[1024];
    bool exits = false;
    int size = mood == REFUSING  ? answer_text(reply, sizeof reply, "{\"Err\":%ld}", mood_number)
               : mood == GARBLING ? answer_text(reply, sizeof reply, "{\"Ok\"")
                                  : carry_out(control->request, reply, sizeof reply, &exits);
    control->size = 0;
    if (size < 0) {
        say(NAME ": failed to read a request: %.200s", control->request);
        return;
    }
    if (send(control->fd, reply, (size_t)size, MSG_NOSIGNAL | MSG_DONTWAIT) < 0) close_control(control);
    if (exits) leave(SUCCESS);
}

static void read_request(struct control *control) {
    ssize_t size = recv(control->fd, control->request, sizeof control->request - 1, MSG_DONTWAIT);
    if (size < 0 && errno == EAGAIN) return;
    if (size <= 0 || mood == CLOSING) {
        close_control(control);
        return;
    }
    control->request[size] = 0;
    if (memchr(control->request, 0, (size_t)size)) { /* not JSON: never answered */
        say(NAME ": failed to read a request: it has a NUL byte");
        return;
    }
    if (mood == SILENT) return;
    control->size = (size_t)size;
    control->wake = now_ms() + (mood == SLOW ? mood_number : 0);
    if (mood != SLOW) answer(control);
}

static void accept_control(void) {
    for (struct control *control = controls; control < controls + CONTROLS; control++) {
        if (control->open) continue;
        int fd = accept4(vm.control, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
        if (fd >= 0) control->open = true, control->fd = fd;
        return;
    }
}

/* ---- The loop ------------------------------------------------------------------------------------------------------ */

static short interest(const struct track *track, int *fd) {
    switch (track->state) {
    case AWAITING:
        *fd = track->rpc;
        return POLLIN;
    case WRITING:
        *fd = track->out;
        return POLLOUT;
    case NEXT:
        *fd = track->fd;
        return POLLIN;
    default:
        *fd = -1;
        return 0;
    }
}

static void sooner(int *timeout, long at, long now) {
    long left = at > now ? at - now : 0;
    if (left > INT32_MAX) left = INT32_MAX;
    if (*timeout < 0 || left < *timeout) *timeout = (int)left;
}

static void turn(void) {
    struct pollfd polled[2 + CONTROLS + TRACKS];
    nfds_t count = 0;
    int timeout = -1;
    long now = now_ms();
    bool room = false;
    for (int i = 0; i < CONTROLS; i++) room |= !controls[i].open;
    polled[count++] = (struct pollfd){.fd = room ? vm.control : -1, .events = POLLIN};
    room = false;
    for (int i = 1; i < TRACKS; i++) room |= tracks[i].state == FREE;
    polled[count++] = (struct pollfd){.fd = room && vm.serving && !vm.suspended ? vm.listener : -1, .events = POLLIN};
    for (int i = 0; i < CONTROLS; i++) {
        bool waits = controls[i].open && controls[i].size;
        polled[count++] = (struct pollfd){.fd = controls[i].open && !waits ? controls[i].fd : -1, .events = POLLIN};
        if (waits) sooner(&timeout, controls[i].wake, now);
    }
    for (int i = 0; i < TRACKS; i++) {
        int fd = -1;
        short events = vm.suspended ? 0 : interest(&tracks[i], &fd);
        polled[count++] = (struct pollfd){.fd = fd, .events = events};
        if (vm.suspended) continue;
        if (tracks[i].state == SLEEPING || tracks[i].state == AWAITING) sooner(&timeout, tracks[i].wake, now);
        if (tracks[i].state == DIALLING) sooner(&timeout, tracks[i].again, now);
    }
    if (poll(polled, count, timeout) < 0) return; /* a signal */
    const struct pollfd *at = polled + 2;
    for (int i = 0; i < CONTROLS; i++, at++) {
        if (at->fd >= 0 && at->revents) read_request(&controls[i]);
        if (controls[i].open && controls[i].size && now_ms() >= controls[i].wake) answer(&controls[i]);
    }
    for (int i = 0; i < TRACKS && !vm.suspended; i++, at++)
        if (tracks[i].state != FREE) wake(&tracks[i], at->fd >= 0 ? at->revents : 0);
    if (polled[0].revents) accept_control();
    if (polled[1].revents && !vm.suspended) accept_steps();
}

int main(int argc, char **argv) {
    signal(SIGPIPE, SIG_IGN);
    parse(argc, argv);
    check_script();
    listen_for_steps();
    struct track *script = tracks; /* the others are not touched, and so cost nothing, until they are used */
    script->fd = script->rpc = -1;
    script->have = strlen(vm.script);
    memcpy(script->lines, vm.script, script->have);
    script->state = NEXT;
    if (!vm.suspended) advance(script);
    for (;;) turn();
}
