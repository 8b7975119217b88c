// SPDX-License-Identifier: Apache-2.0
/*
 * The guest's first process: a payload that does what a script says.
 *
 * As process 1 it mounts the kernel's file systems, loads the modules named in /modules and takes its script from the
 * kernel parameter vmactor.script; as an ordinary program it takes the script from its first argument. It speaks
 * MessagePack-RPC to the manager (host, port = own CID), and carries out further steps that the host sends as text
 * lines to vsock port 5000. guest/README.md describes the steps; the table at the end of this file lists them.
 *
 * One process per connection keeps every step free to block. Nothing is allocated: all buffers have fixed sizes.
 */
#define _GNU_SOURCE
#include <ctype.h>
#include <errno.h>
#include <arpa/inet.h>
#include <fcntl.h>
#include <glob.h>
#include <linux/if.h>
#include <linux/input.h>
#include <linux/reboot.h>
#include <linux/route.h>
#include <linux/vm_sockets.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define DEFAULT_SCRIPT "started;ready;serve"
#define NO_MANAGER "MICRODROID_FAILED_TO_CONNECT_TO_VIRTUALIZATION_SERVICE"
#define NOT_OURS "only the guest's first process stops the machine"

enum {
    STEP_PORT = 5000,
    LINE_SIZE = 256 * 1024,
    ANSWER_SIZE = 64 * 1024,
    CONNECT_LIMIT_MS = 5000, /* how long the manager may take to be there */
    REPLY_LIMIT_S = 10,      /* how long it may take to answer */
    RAW_LIMIT_MS = 2000,
    TCP_LIMIT_S = 3,
    LINGER_MS = 100, /* for the last answer to leave before the machine stops */
};

static bool first; /* whether this is, or descends from, the guest's first process: only then may it stop the machine */
static unsigned own_cid;
static int client = -1; /* the connection that this process serves; -1 in the script */
static int listener = -1;
static bool serving;

/* ---- Text that grows up to the end of its buffer --------------------------------------------------------------- */

struct text {
    char *data;
    size_t size, room;
};

static void put(struct text *text, const char *format, ...) {
    va_list args;
    va_start(args, format);
    int written = vsnprintf(text->data + text->size, text->room - text->size, format, args);
    va_end(args);
    if (written > 0) {
        text->size += (size_t)written;
        if (text->size >= text->room) text->size = text->room - 1;
    }
}

/* Every step ends with one of these two. */
static bool fail(struct text *answer, const char *what) {
    put(answer, "%s: %s", what, strerror(errno));
    return false;
}

static bool fail_with(struct text *answer, const char *why) {
    put(answer, "%s", why);
    return false;
}

static bool write_all(int fd, const void *data, size_t size) {
    for (const char *at = data; size > 0;) {
        ssize_t written = write(fd, at, size);
        if (written < 0 && errno == EINTR) continue;
        if (written < 0) return false;
        at += written;
        size -= (size_t)written;
    }
    return true;
}

static bool write_file(const char *path, const char *data, int flags) {
    int fd = open(path, O_WRONLY | O_NOCTTY | O_CLOEXEC | flags, 0644);
    if (fd < 0) return false;
    bool written = write_all(fd, data, strlen(data)) && (fsync(fd) == 0 || errno == EINVAL || errno == EROFS);
    int error = errno;
    if (isatty(fd)) tcdrain(fd); /* the port is emulated: what is still buffered when the machine stops is lost */
    close(fd);
    errno = error;
    return written;
}

static long now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000L + now.tv_nsec / 1000000L;
}

/* ---- The machine -------------------------------------------------------------------------------------------------- */

static void load_modules(const char *names) {
    FILE *list = fopen(names, "re");
    if (!list) return;
    char path[256];
    while (fgets(path, sizeof path, list)) {
        path[strcspn(path, "\n")] = 0;
        if (!*path) continue;
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) && errno != EEXIST))
            dprintf(2, "vmactor-agent: module %s: %s\n", path, strerror(errno));
        if (fd >= 0) close(fd);
    }
    fclose(list);
}

static pid_t button_watch;

/* The host asks for an end by pressing the power button; nobody else is here to hear it. */
static void watch_power_button(void) {
    struct pollfd buttons[8];
    nfds_t count = 0;
    glob_t devices;
    if (glob("/dev/input/event*", 0, NULL, &devices)) return;
    for (size_t i = 0; i < devices.gl_pathc && count < 8; i++) {
        int fd = open(devices.gl_pathv[i], O_RDONLY | O_CLOEXEC);
        if (fd >= 0) buttons[count++] = (struct pollfd){.fd = fd, .events = POLLIN};
    }
    globfree(&devices);
    button_watch = fork();
    if (button_watch == 0) {
        struct input_event event;
        while (poll(buttons, count, -1) >= 0)
            for (nfds_t i = 0; i < count; i++)
                if (buttons[i].revents && read(buttons[i].fd, &event, sizeof event) == sizeof event &&
                    event.type == EV_KEY && event.code == KEY_POWER && event.value == 1)
                    reboot(LINUX_REBOOT_CMD_POWER_OFF);
        _exit(0);
    }
    for (nfds_t i = 0; i < count; i++) close(buttons[i].fd);
}

static struct sockaddr *in_address(const char *text, struct sockaddr_in *address) {
    memset(address, 0, sizeof *address);
    address->sin_family = AF_INET;
    inet_pton(AF_INET, text, &address->sin_addr);
    return (struct sockaddr *)address;
}

/* CLIENT::GATEWAY:NETMASK::DEVICE:off, as the kernel's own autoconfiguration and initramfs-tools read it. */
static void set_up_interface(char *words) {
    char *field[7] = {"", "", "", "", "", "", ""};
    for (int i = 0; i < 7 && words; i++) field[i] = strsep(&words, ":");
    struct ifreq request = {0};
    struct rtentry route = {.rt_flags = RTF_UP | RTF_GATEWAY};
    struct sockaddr_in address;
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    snprintf(request.ifr_name, sizeof request.ifr_name, "%s", field[5]);
    request.ifr_addr = *in_address(field[0], &address);
    bool ok = ioctl(fd, SIOCSIFADDR, &request) == 0;
    request.ifr_netmask = *in_address(field[3], &address);
    ok = ok && ioctl(fd, SIOCSIFNETMASK, &request) == 0;
    request.ifr_flags = IFF_UP;
    ok = ok && ioctl(fd, SIOCSIFFLAGS, &request) == 0;
    if (ok && *field[2]) {
        route.rt_gateway = *in_address(field[2], &address);
        route.rt_dst = route.rt_genmask = *in_address("0.0.0.0", &address);
        ok = ioctl(fd, SIOCADDRT, &route) == 0;
    }
    if (!ok) dprintf(2, "vmactor-agent: network %s: %s\n", field[5], strerror(errno));
    close(fd);
}

/* The drivers take their time to load where the machine is emulated, so only who has a network pays for it. */
static void set_up_network(void) {
    char line[4096], *rest = line, *word;
    int fd = open("/proc/cmdline", O_RDONLY | O_CLOEXEC);
    ssize_t size = fd < 0 ? -1 : read(fd, line, sizeof line - 1);
    if (fd >= 0) close(fd);
    if (size < 0) return;
    line[size] = 0;
    bool loaded = false;
    while ((word = strsep(&rest, " \n")))
        if (!strncmp(word, "ip=", 3)) {
            if (!loaded) load_modules("/network-modules");
            loaded = true;
            set_up_interface(word + 3);
        }
}

static void set_up_machine(void) {
    const char *systems[][2] = {{"devtmpfs", "/dev"}, {"proc", "/proc"}, {"sysfs", "/sys"}};
    for (size_t i = 0; i < 3; i++) {
        mkdir(systems[i][1], 0755);
        mount(systems[i][0], systems[i][1], systems[i][0], 0, "");
    }
    int console = open("/dev/console", O_RDWR);
    if (console >= 0) {
        for (int fd = 0; fd < 3; fd++) dup2(console, fd);
        if (console > 2) close(console);
    }
    mkdir("/tmp", 01777);
    write_file("/proc/sys/kernel/sysrq", "1", 0);
    load_modules("/modules");
    set_up_network();
    watch_power_button();
    setenv("PATH", "/usr/bin:/bin:/usr/sbin:/sbin", 1);
}

static _Noreturn void rest_for_ever(void) {
    for (;;) pause();
}

static _Noreturn void stop_machine(int command) {
    if (!first || reboot(command)) exit(1);
    rest_for_ever();
}

/* The answer to a step that ends the machine must leave first; the host says by closing that it has it. */
static void answer_before_the_end(void) {
    if (client < 0) return;
    if (!write_all(client, "ok\n", 3)) return;
    struct pollfd hang_up = {.fd = client, .events = POLLIN | POLLRDHUP};
    poll(&hang_up, 1, LINGER_MS);
}

static void learn_own_cid(void) {
    int fd = open("/dev/vsock", O_RDONLY | O_CLOEXEC);
    if (fd < 0 || ioctl(fd, IOCTL_VM_SOCKETS_GET_LOCAL_CID, &own_cid))
        dprintf(2, "vmactor-agent: /dev/vsock: %s; is a vsock device there?\n", strerror(errno));
    if (fd >= 0) close(fd);
}

/* ---- vsock -------------------------------------------------------------------------------------------------------- */

static int dial_host(unsigned port) {
    int fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0) return -1;
    struct timeval limit = {.tv_sec = REPLY_LIMIT_S};
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
    struct sockaddr_vm host = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_HOST, .svm_port = port};
    if (connect(fd, (struct sockaddr *)&host, sizeof host)) {
        int error = errno;
        close(fd);
        errno = error;
        return -1;
    }
    return fd;
}

static int dial_manager(void) {
    long deadline = now_ms() + CONNECT_LIMIT_MS;
    for (;;) {
        int fd = dial_host(own_cid);
        if (fd >= 0) return fd;
        int error = errno;
        if (now_ms() >= deadline) {
            dprintf(2, "vmactor-agent: no manager at host port %u: %s\n", own_cid, strerror(error));
            if (first && !write_file("/dev/ttyS1", NO_MANAGER, 0)) dprintf(2, "vmactor-agent: no failure port\n");
            stop_machine(LINUX_REBOOT_CMD_POWER_OFF);
        }
        usleep(100 * 1000);
    }
}

static void listen_for_steps(void) {
    listener = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_vm any = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = STEP_PORT};
    if (listener >= 0 && bind(listener, (struct sockaddr *)&any, sizeof any) == 0 && listen(listener, 128) == 0) return;
    if (listener >= 0) close(listener);
    listener = -1;
}

/* ---- MessagePack-RPC ---------------------------------------------------------------------------------------------- */

struct reader {
    const unsigned char *at, *end;
};

enum outcome { COMPLETE, INCOMPLETE, INVALID };

static bool take(struct reader *reader, size_t size, uint64_t *value) {
    if ((size_t)(reader->end - reader->at) < size) return false;
    *value = 0;
    while (size--) *value = *value << 8 | *reader->at++;
    return true;
}

/* Reads one value and writes it in a JSON-like way, for people. */
static enum outcome render(struct reader *reader, struct text *out, int depth) {
    uint64_t tag, value = 0;
    if (depth > 8) return INVALID;
    if (!take(reader, 1, &tag)) return INCOMPLETE;
    enum { TEXT, ARRAY, MAP } shape;
    if (tag < 0x80 || tag >= 0xe0) return put(out, "%d", (int)(int8_t)tag), COMPLETE;
    if (tag == 0xc0) return put(out, "null"), COMPLETE;
    if (tag == 0xc2 || tag == 0xc3) return put(out, tag == 0xc3 ? "true" : "false"), COMPLETE;
    if (tag >= 0xcc && tag <= 0xcf) {
        if (!take(reader, 1u << (tag - 0xcc), &value)) return INCOMPLETE;
        return put(out, "%llu", (unsigned long long)value), COMPLETE;
    }
    if (tag >= 0xd0 && tag <= 0xd3) {
        size_t size = 1u << (tag - 0xd0);
        if (!take(reader, size, &value)) return INCOMPLETE;
        unsigned shift = 64 - 8 * (unsigned)size;
        return put(out, "%lld", (long long)(value << shift) >> shift), COMPLETE;
    }
    if (tag >= 0xa0 && tag <= 0xbf) {
        shape = TEXT;
        value = tag & 31;
    } else if (tag >= 0x80 && tag <= 0x9f) {
        shape = tag < 0x90 ? MAP : ARRAY;
        value = tag & 15;
    } else if ((tag >= 0xc4 && tag <= 0xc6) || (tag >= 0xd9 && tag <= 0xdb)) {
        shape = TEXT;
        if (!take(reader, 1u << (tag - (tag < 0xd9 ? 0xc4 : 0xd9)), &value)) return INCOMPLETE;
    } else if (tag >= 0xdc && tag <= 0xdf) {
        shape = tag < 0xde ? ARRAY : MAP;
        if (!take(reader, tag & 1 ? 4 : 2, &value)) return INCOMPLETE;
    } else {
        return INVALID; /* floats and extensions are not part of this protocol */
    }
    if (shape == TEXT) {
        if ((uint64_t)(reader->end - reader->at) < value) return INCOMPLETE;
        put(out, "%.*s", (int)value, (const char *)reader->at);
        reader->at += value;
        return COMPLETE;
    }
    put(out, shape == MAP ? "{" : "[");
    for (uint64_t i = 0; i < value * (shape == MAP ? 2 : 1); i++) {
        if (i) put(out, shape == MAP && i % 2 ? ": " : ", ");
        enum outcome outcome = render(reader, out, depth + 1);
        if (outcome != COMPLETE) return outcome;
    }
    put(out, shape == MAP ? "}" : "]");
    return COMPLETE;
}

/* Reads one response [1, msgid, error, result]; the error's text, or the result's, goes to answer. */
static enum outcome read_response(const unsigned char *data, size_t size, unsigned id, struct text *answer, bool *refused) {
    struct reader reader = {data, data + size};
    if (size < 1) return INCOMPLETE;
    if (*reader.at++ != 0x94) return INVALID;
    static char fields[4][4096];
    struct text texts[4];
    for (int i = 0; i < 4; i++) {
        texts[i] = (struct text){fields[i], 0, sizeof fields[i]};
        fields[i][0] = 0;
        enum outcome outcome = render(&reader, &texts[i], 0);
        if (outcome != COMPLETE) return outcome;
    }
    if (strcmp(fields[0], "1") || strtoul(fields[1], NULL, 10) != id) return INVALID;
    *refused = strcmp(fields[2], "null") != 0;
    if (*refused) put(answer, "%s", fields[2]);
    return COMPLETE;
}

struct message {
    unsigned char data[70 * 1024];
    size_t size;
};

static void pack(struct message *message, const void *data, size_t size) {
    if (size > sizeof message->data - message->size) size = sizeof message->data - message->size;
    memcpy(message->data + message->size, data, size);
    message->size += size;
}

static void pack_number(struct message *message, unsigned char tag, uint32_t value, size_t size) {
    pack(message, &tag, 1);
    for (size_t i = size; i--;) pack(message, &(unsigned char){(unsigned char)(value >> 8 * i)}, 1);
}

static void pack_text(struct message *message, const char *text) {
    size_t size = strnlen(text, UINT16_MAX);
    if (size < 32) pack_number(message, 0xa0 | (unsigned char)size, 0, 0);
    else pack_number(message, 0xda, (uint32_t)size, 2);
    pack(message, text, size);
}

static struct message begin_request(const char *method, unsigned id, unsigned params) {
    struct message message = {.size = 0};
    pack(&message, "\x94\x00", 2);
    pack_number(&message, 0xce, id, 4);
    pack_text(&message, method);
    pack_number(&message, (unsigned char)(0x90 | params), 0, 0);
    return message;
}

/* A connection of its own for each call: no process has to share one, and an idle limit cannot strike. */
static bool call(const struct message *request, unsigned id, struct text *answer) {
    int fd = dial_manager();
    bool ok = false, refused = false;
    static unsigned char reply[ANSWER_SIZE];
    size_t have = 0;
    if (!write_all(fd, request->data, request->size)) {
        fail(answer, "send to the manager");
        goto out;
    }
    while (have < sizeof reply) {
        ssize_t received = read(fd, reply + have, sizeof reply - have);
        if (received <= 0) {
            if (received == 0) put(answer, "the manager closed the connection without an answer");
            else fail(answer, errno == EAGAIN ? "the manager did not answer in time" : "receive from the manager");
            goto out;
        }
        have += (size_t)received;
        enum outcome outcome = read_response(reply, have, id, answer, &refused);
        if (outcome == INCOMPLETE) continue;
        if (outcome == INVALID) put(answer, "the manager's answer is not MessagePack-RPC");
        ok = outcome == COMPLETE && !refused;
        break;
    }
out:
    close(fd);
    if (!ok) dprintf(1, "vmactor-agent: refused: %s\n", answer->data);
    return ok;
}

static unsigned next_id(void) {
    static unsigned id;
    return ++id;
}

/* ---- Steps: each gets the rest of its line, fills in the answer, returns whether it went well ------------------- */

static bool do_started(char *rest, struct text *answer) {
    (void)rest;
    unsigned id = next_id();
    struct message request = begin_request("notifyPayloadStarted", id, 0);
    return call(&request, id, answer);
}

static bool do_ready(char *rest, struct text *answer) {
    (void)rest;
    unsigned id = next_id();
    struct message request = begin_request("notifyPayloadReady", id, 0);
    return call(&request, id, answer);
}

static bool do_finished(char *rest, struct text *answer) {
    unsigned id = next_id();
    struct message request = begin_request("notifyPayloadFinished", id, 1);
    pack_number(&request, 0xd2, (uint32_t)strtol(rest, NULL, 0), 4);
    return call(&request, id, answer);
}

static bool do_error(char *rest, struct text *answer) {
    unsigned id = next_id();
    struct message request = begin_request("notifyError", id, 2);
    pack_number(&request, 0xd2, (uint32_t)strtol(rest, &rest, 0), 4);
    pack_text(&request, rest + (*rest == ' '));
    return call(&request, id, answer);
}

static bool do_poweroff(char *rest, struct text *answer) {
    (void)rest;
    if (!first) return fail_with(answer, NOT_OURS);
    answer_before_the_end();
    stop_machine(LINUX_REBOOT_CMD_POWER_OFF);
}

static bool do_reboot(char *rest, struct text *answer) {
    (void)rest;
    if (!first) return fail_with(answer, NOT_OURS);
    answer_before_the_end();
    stop_machine(LINUX_REBOOT_CMD_RESTART);
}

static bool do_panic(char *rest, struct text *answer) {
    (void)rest;
    if (!first) return fail_with(answer, NOT_OURS);
    answer_before_the_end();
    write_file("/proc/sysrq-trigger", "c", 0);
    return fail(answer, "/proc/sysrq-trigger");
}

static bool do_hang(char *rest, struct text *answer) {
    (void)rest, (void)answer;
    rest_for_ever();
}

static bool do_deaf(char *rest, struct text *answer) {
    (void)rest;
    if (button_watch <= 0) return fail_with(answer, "nothing listens to a power button");
    return kill(button_watch, SIGKILL) == 0 || fail(answer, "kill");
}

static bool do_sleep(char *rest, struct text *answer) {
    (void)answer;
    long ms = strtol(rest, NULL, 10);
    struct timespec left = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000L};
    while (nanosleep(&left, &left) && errno == EINTR) continue;
    return true;
}

static bool do_print(char *rest, struct text *answer) {
    (void)answer;
    return dprintf(1, "%s\n", rest) >= 0;
}

static bool do_failure(char *rest, struct text *answer) {
    return write_file("/dev/ttyS1", rest, 0) || fail(answer, "/dev/ttyS1");
}

static bool do_log(char *rest, struct text *answer) {
    int fd = open("/dev/hvc2", O_WRONLY | O_NOCTTY | O_CLOEXEC);
    if (fd < 0) return fail(answer, "/dev/hvc2");
    bool written = dprintf(fd, "%s\n", rest) >= 0;
    close(fd);
    return written || fail(answer, "/dev/hvc2");
}

static bool do_spam(char *rest, struct text *answer) {
    (void)rest;
    pid_t pid = fork();
    if (pid < 0) return fail(answer, "fork");
    if (pid) return true;
    static char block[4096];
    for (size_t i = 0; i < sizeof block; i++) block[i] = i % 80 == 79 ? '\n' : (char)('a' + i % 26);
    for (;;) write_all(1, block, sizeof block);
}

static bool do_echo(char *rest, struct text *answer) {
    put(answer, "%s", rest);
    return true;
}

/* Sends every byte back that comes by TCP, to any number of peers at a time. */
static bool do_tcp_echo(char *rest, struct text *answer) {
    struct sockaddr_in any = {.sin_family = AF_INET, .sin_port = htons((uint16_t)strtoul(rest, NULL, 10))};
    int on = 1, server = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    setsockopt(server, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(server, (struct sockaddr *)&any, sizeof any) || listen(server, 16)) {
        fail(answer, "listen");
        close(server);
        return false;
    }
    if (fork() == 0) {
        signal(SIGCHLD, SIG_IGN);
        for (;;) {
            int peer = accept4(server, NULL, NULL, SOCK_CLOEXEC);
            if (peer >= 0 && fork() == 0) {
                static char data[64 * 1024];
                ssize_t received;
                while ((received = read(peer, data, sizeof data)) > 0 && write_all(peer, data, (size_t)received));
                _exit(0);
            }
            close(peer);
        }
    }
    close(server);
    return true;
}

/* ADDRESS PORT TEXT: sends a line by TCP and answers as many bytes as come back for it. */
static bool do_tcp(char *rest, struct text *answer) {
    struct sockaddr_in to;
    char *address = strsep(&rest, " ");
    in_address(address, &to);
    to.sin_port = htons(rest ? (uint16_t)strtoul(rest, &rest, 10) : 0);
    const char *words = rest && *rest ? rest + 1 : "";
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct timeval limit = {.tv_sec = TCP_LIMIT_S};
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
    bool ok = connect(fd, (struct sockaddr *)&to, sizeof to) == 0 || fail(answer, "connect");
    ok = ok && (write_all(fd, words, strlen(words)) || fail(answer, "send"));
    char data[1024];
    for (size_t left = strlen(words); ok && left;) {
        ssize_t received = read(fd, data, left < sizeof data ? left : sizeof data);
        if (received <= 0) {
            ok = fail(answer, "receive");
            break;
        }
        put(answer, "%.*s", (int)received, data);
        left -= (size_t)received;
    }
    close(fd);
    return ok;
}

static bool do_dial(char *rest, struct text *answer) {
    unsigned port = (unsigned)strtoul(rest, &rest, 10);
    int fd = dial_host(port);
    if (fd < 0) return fail(answer, "connect");
    bool ok = write_all(fd, rest + (*rest == ' '), strlen(rest + (*rest == ' '))) && write_all(fd, "\n", 1);
    if (!ok) fail(answer, "send");
    while (ok && answer->size + 1 < answer->room) {
        char byte;
        ssize_t received = read(fd, &byte, 1);
        if (received == 1 && byte == '\n') break;
        if (received == 1) {
            put(answer, "%c", byte);
        } else {
            answer->size = 0;
            ok = received == 0 ? fail_with(answer, "closed before a line came") : fail(answer, "receive");
        }
    }
    close(fd);
    return ok;
}

/* Files of the kernel, and devices: READ shows them up to a NUL byte, line ends as "|"; WRITE adds no line end. */
static bool do_read(char *rest, struct text *answer) {
    int fd = open(rest, O_RDONLY | O_NOCTTY | O_CLOEXEC);
    static char content[4096];
    ssize_t size = fd < 0 ? -1 : read(fd, content, sizeof content - 1);
    if (fd >= 0) close(fd);
    if (size < 0) return fail(answer, rest);
    content[size] = 0;
    for (char *end; (end = strchr(content, '\n'));) *end = '|';
    put(answer, "%s", content);
    return true;
}

static bool do_write(char *rest, struct text *answer) {
    char *path = strsep(&rest, " ");
    return write_file(path, rest ? rest : "", O_CREAT) || fail(answer, path);
}

static bool do_uname(char *rest, struct text *answer) {
    (void)rest;
    struct utsname name;
    uname(&name);
    put(answer, "%s %s %s", name.sysname, name.release, name.machine);
    return true;
}

static bool do_cid(char *rest, struct text *answer) {
    (void)rest;
    put(answer, "%u", own_cid);
    return true;
}

static bool do_raw(char *rest, struct text *answer) {
    size_t size = 0;
    for (char *from = rest; *from && *from != ' '; from += 2, size++) {
        unsigned byte;
        if (!isxdigit((unsigned char)from[0]) || !isxdigit((unsigned char)from[1]) || sscanf(from, "%2x", &byte) != 1)
            return fail_with(answer, "raw takes an even number of hexadecimal digits");
        rest[size] = (char)byte; /* in place: two digits make one byte */
    }
    int fd = dial_manager();
    bool sent = write_all(fd, rest, size), closed = !sent;
    static unsigned char reply[ANSWER_SIZE / 2 - 16];
    size_t have = 0;
    long deadline = now_ms() + RAW_LIMIT_MS;
    while (!closed && have < sizeof reply) {
        struct pollfd readable = {.fd = fd, .events = POLLIN};
        long left = deadline - now_ms();
        if (left <= 0 || poll(&readable, 1, (int)left) == 0) break;
        ssize_t received = read(fd, reply + have, sizeof reply - have);
        closed = received <= 0;
        if (!closed) have += (size_t)received;
    }
    close(fd);
    put(answer, "%s ", closed ? "closed" : "open");
    for (size_t i = 0; i < have; i++) put(answer, "%02x", reply[i]);
    return true;
}

static bool do_flood(char *rest, struct text *answer) {
    unsigned wanted = (unsigned)strtoul(rest, NULL, 10), made = 0, open_still = 0;
    static struct pollfd all[4096];
    if (wanted > 4096) return fail_with(answer, "flood makes at most 4096 connections");
    setrlimit(RLIMIT_NOFILE, &(struct rlimit){8192, 8192});
    for (; made < wanted; made++) {
        all[made] = (struct pollfd){.fd = dial_host(own_cid), .events = POLLIN | POLLRDHUP};
        if (all[made].fd < 0) break;
    }
    usleep(200 * 1000); /* those that the host does not want are closed by then */
    poll(all, made, 0);
    for (unsigned i = 0; i < made; i++) open_still += all[i].revents == 0;
    put(answer, "made %u, open %u", made, open_still);
    return true; /* they stay open as long as this process lives: the connection, or the script */
}

static bool do_exec(char *rest, struct text *answer) {
    char *args[64] = {0}, *save = NULL;
    size_t count = 0;
    for (char *word = strtok_r(rest, " ", &save); word && count < 63; word = strtok_r(NULL, " ", &save))
        args[count++] = word;
    if (!count) return fail_with(answer, "exec needs a program");
    pid_t pid = fork();
    if (pid < 0) return fail(answer, "fork");
    if (!pid) {
        execvp(args[0], args);
        dprintf(2, "vmactor-agent: %s: %s\n", args[0], strerror(errno));
        _exit(127);
    }
    int status;
    while (waitpid(pid, &status, 0) < 0)
        if (errno != EINTR) return fail(answer, "wait");
    put(answer, "%d", WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
    return true;
}

/* For a guest whose console is to stay silent while all goes well. */
static bool do_run(char *rest, struct text *answer) {
    bool ok = do_exec(rest, answer);
    if (ok && !strcmp(answer->data, "0")) answer->size = 0, answer->data[0] = 0;
    return ok;
}

/* Debian's cloud kernel has no driver for this device, so its registers are written from here. The two stages of
 * about 200 ms each run out, and the machine acts as it was told to on a watchdog. */
static bool do_watchdog(char *rest, struct text *answer) {
    (void)rest;
    if (!first) return fail_with(answer, NOT_OURS);
    glob_t devices;
    char path[256], device[16], line[128];
    if (glob("/sys/bus/pci/devices/*", 0, NULL, &devices)) return fail_with(answer, "no PCI bus");
    for (size_t i = 0; i < devices.gl_pathc; i++) {
        snprintf(path, sizeof path, "%s/device", devices.gl_pathv[i]);
        FILE *file = fopen(path, "re");
        if (!file) continue;
        bool read = fgets(device, sizeof device, file) != NULL;
        fclose(file);
        if (!read || strncmp(device, "0x25ab", 6)) continue;
        snprintf(path, sizeof path, "%s/enable", devices.gl_pathv[i]);
        if (!write_file(path, "1", 0)) return fail(answer, path);
        snprintf(path, sizeof path, "%s/resource", devices.gl_pathv[i]);
        if (!(file = fopen(path, "re")) || !fgets(line, sizeof line, file)) return fail(answer, path);
        fclose(file);
        snprintf(path, sizeof path, "%s/resource0", devices.gl_pathv[i]);
        int memory = open(path, O_RDWR | O_CLOEXEC);
        snprintf(path, sizeof path, "%s/config", devices.gl_pathv[i]);
        int config = open(path, O_RDWR | O_CLOEXEC);
        char *page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);
        if (memory < 0 || config < 0 || page == MAP_FAILED) return fail(answer, path);
        char *base = page + (strtoull(line, NULL, 16) & 4095);
        volatile uint32_t *timers = (void *)base;
        volatile uint16_t *reload = (void *)(base + 12);
        for (int stage = 0; stage < 2; stage++) {
            *reload = 0x80, *reload = 0x86; /* unlocks one write */
            timers[stage] = 200;
        }
        uint16_t mode = 0x0003; /* 1 kHz, no interrupt, reset at the end */
        uint8_t enable = 0x02;
        if (pwrite(config, &mode, 2, 0x60) != 2 || pwrite(config, &enable, 1, 0x68) != 1) return fail(answer, path);
        return true;
    }
    return fail_with(answer, "no i6300esb device");
}

static bool do_serve(char *rest, struct text *answer);
static bool do_stream(char *rest, struct text *answer);

static const struct step {
    const char *name;
    bool (*act)(char *rest, struct text *answer);
} steps[] = {
    {"cid", do_cid}, {"deaf", do_deaf}, {"dial", do_dial}, {"echo", do_echo},
    {"error", do_error}, {"exec", do_exec}, {"failure", do_failure}, {"finished", do_finished},
    {"flood", do_flood}, {"hang", do_hang}, {"log", do_log}, {"panic", do_panic},
    {"poweroff", do_poweroff}, {"print", do_print}, {"raw", do_raw}, {"read", do_read},
    {"ready", do_ready}, {"reboot", do_reboot}, {"run", do_run}, {"serve", do_serve},
    {"sleep", do_sleep}, {"spam", do_spam}, {"started", do_started}, {"stream", do_stream},
    {"tcp", do_tcp}, {"tcp-echo", do_tcp_echo},
    {"uname", do_uname}, {"watchdog", do_watchdog}, {"write", do_write},
};

static bool do_step(char *line, struct text *answer) {
    answer->size = 0;
    answer->data[0] = 0;
    char *rest = line + strcspn(line, " ");
    if (*rest) *rest++ = 0;
    for (size_t i = 0; i < sizeof steps / sizeof *steps; i++)
        if (!strcmp(steps[i].name, line)) return steps[i].act(rest, answer);
    put(answer, "unknown step %s", line);
    return false;
}

/* ---- Serving steps ------------------------------------------------------------------------------------------------ */

static char buffer[LINE_SIZE];
static size_t buffered, consumed; /* of buffer: how much came in, how much of that is used up */

static bool do_stream(char *rest, struct text *answer) {
    (void)rest;
    if (client < 0) return fail_with(answer, "stream needs a connection");
    if (!write_all(client, "ok\n", 3)) _exit(0);
    write_all(client, buffer + consumed, buffered - consumed);
    for (;;) {
        ssize_t received = read(client, buffer, 64 * 1024);
        if (received <= 0 || !write_all(client, buffer, (size_t)received)) _exit(0);
    }
}

static _Noreturn void serve_connection(void) {
    static char data[ANSWER_SIZE];
    struct text answer = {data, 0, sizeof data};
    for (;;) {
        char *end = memchr(buffer + consumed, '\n', buffered - consumed);
        if (!end) {
            memmove(buffer, buffer + consumed, buffered - consumed);
            buffered -= consumed;
            consumed = 0;
            ssize_t received = read(client, buffer + buffered, sizeof buffer - buffered);
            if (received <= 0) _exit(0); /* also a line that fills the whole buffer: nothing could be read into it */
            buffered += (size_t)received;
            continue;
        }
        *end = 0;
        char *line = buffer + consumed;
        consumed = (size_t)(end + 1 - buffer);
        bool ok = do_step(line, &answer);
        const char *verdict = ok ? "ok" : "error";
        if (dprintf(client, "%s%s%s\n", verdict, answer.size ? " " : "", data) < 0) _exit(0);
    }
}

static bool do_serve(char *rest, struct text *answer) {
    (void)rest;
    if (client >= 0) return fail_with(answer, "already serving");
    if (listener < 0) return fail_with(answer, "vsock port 5000 could not be opened");
    pid_t pid = fork();
    if (pid < 0) return fail(answer, "fork");
    if (pid) {
        serving = true;
        return true;
    }
    signal(SIGCHLD, SIG_IGN); /* connections that end need no one's attention */
    for (;;) {
        client = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        if (client < 0) {
            usleep(100 * 1000);
            continue;
        }
        if (fork() == 0) {
            signal(SIGCHLD, SIG_DFL); /* but a step may wait for a child of its own */
            close(listener);
            serve_connection();
        }
        close(client);
    }
}

/* ---- The script --------------------------------------------------------------------------------------------------- */

/* The kernel cuts its command line at spaces outside double quotes and knows no other quoting. A parameter with a dot
 * in its name is taken for a module's and not handed to process 1, so the line itself is read. */
static const char *script_of_kernel(void) {
    static char line[4096], script[4096];
    int fd = open("/proc/cmdline", O_RDONLY | O_CLOEXEC);
    ssize_t size = fd < 0 ? -1 : read(fd, line, sizeof line - 1);
    if (fd >= 0) close(fd);
    if (size < 0) return DEFAULT_SCRIPT;
    const char *name = "vmactor.script=", *found = NULL;
    bool quoted = false;
    size_t used = 0;
    for (char *at = line;; at++) {
        if (*at == '"') {
            quoted = !quoted;
        } else if (!*at || (isspace((unsigned char)*at) && !quoted)) {
            script[used] = 0;
            if (!strncmp(script, name, strlen(name))) found = strcpy(line, script + strlen(name));
            if (found || !*at) break;
            used = 0;
        } else {
            script[used++] = *at;
        }
    }
    return found ? found : DEFAULT_SCRIPT;
}

int main(int argc, char **argv) {
    first = getpid() == 1;
    if (first) set_up_machine();
    signal(SIGPIPE, SIG_IGN);
    learn_own_cid();
    listen_for_steps(); /* before the script: what the host sends as soon as it hears "ready" must not be refused */
    static char script[4096], data[ANSWER_SIZE];
    struct text answer = {data, 0, sizeof data};
    snprintf(script, sizeof script, "%s", first ? script_of_kernel() : argc > 1 ? argv[1] : DEFAULT_SCRIPT);
    for (char *rest = script, *step; (step = strsep(&rest, ";"));) {
        step += strspn(step, " ");
        char name[32];
        snprintf(name, sizeof name, "%.*s", (int)strcspn(step, " "), step);
        bool ok = *step ? do_step(step, &answer) : true;
        if (*step && (!ok || answer.size)) dprintf(1, "vmactor-agent: %s: %s %s\n", name, ok ? "ok" : "error", data);
    }
    while (serving) /* process 1 also inherits every orphan */
        if (wait(NULL) < 0) pause();
    if (first) stop_machine(LINUX_REBOOT_CMD_POWER_OFF);
    return 0;
}
