/* The example payload: says hello to whoever connects to vsock port 5001, and counts its boots in the encrypted store.
 *
 * It answers each line: "hello" with what it knows of itself, "finish N" by ending with that code, "abort" by dying of a
 * signal. A static program stands for the shared library that Microdroid would load; guest/tinydroid/README.md tells
 * what the environment holds.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/vm_sockets.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { PORT = 5001 };

static const char *environment(const char *name) {
    const char *value = getenv(name);
    return value ? value : "";
}

/* A name for the instance that does not give its secret away (64-bit FNV-1a). */
static unsigned long long instance_name(void) {
    uint64_t hash = 0xcbf29ce484222325;
    for (const char *at = environment("TINYDROID_INSTANCE_SECRET"); *at; at++) hash = (hash ^ (uint8_t)*at) * 0x100000001b3;
    return hash;
}

static unsigned count_boot(void) {
    char path[256];
    if (!*environment("TINYDROID_ENCRYPTED_STORE")) return 0;
    snprintf(path, sizeof path, "%s/boots", environment("TINYDROID_ENCRYPTED_STORE"));
    unsigned boots = 0;
    FILE *file = fopen(path, "r");
    if (file) {
        if (fscanf(file, "%u", &boots) != 1) boots = 0;
        fclose(file);
    }
    file = fopen(path, "w");
    if (!file || fprintf(file, "%u\n", ++boots) < 0 || fflush(file) || fsync(fileno(file))) perror(path);
    if (file) fclose(file);
    return boots;
}

static void read_line_of(const char *root, const char *name, char *line, size_t size) {
    char path[256];
    snprintf(path, sizeof path, "%s/%s", root, name);
    FILE *file = fopen(path, "r");
    if (!file || !fgets(line, (int)size, file)) *line = 0;
    if (file) fclose(file);
    line[strcspn(line, "\n")] = 0;
}

int main(void) {
    unsigned boots = count_boot();
    char asset[128], extra[128];
    read_line_of(environment("TINYDROID_APK"), "assets/greeting.txt", asset, sizeof asset);
    read_line_of("/mnt/extra-apk/0", "assets/greeting.txt", extra, sizeof extra);

    int listener = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_vm any = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = PORT};
    if (listener < 0 || bind(listener, (struct sockaddr *)&any, sizeof any) || listen(listener, 8)) {
        perror("vsock");
        return 1;
    }
    printf("hello from the payload, boot %u\n", boots);
    fflush(stdout);
    int ready = atoi(environment("TINYDROID_READY_FD"));
    if (write(ready, "ready\n", 6) != 6) perror("ready");
    close(ready);

    for (;;) {
        int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        FILE *stream = fd < 0 ? NULL : fdopen(fd, "r");
        char line[256];
        while (stream && fgets(line, sizeof line, stream)) {
            int code;
            if (sscanf(line, "finish %d", &code) == 1) return code;
            if (!strcmp(line, "abort\n")) abort();
            dprintf(fd, "%s; boot %u of instance %016llx%s%s\n", asset, boots, instance_name(), *extra ? "; " : "", extra);
        }
        if (stream) fclose(stream);
    }
}
