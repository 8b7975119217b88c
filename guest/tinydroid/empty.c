/* The payload of EmptyPayloadApp: ready at once, then nothing for ever, so that somebody can look at the guest. */
#include <stdlib.h>
#include <unistd.h>

int main(void) {
    const char *ready = getenv("TINYDROID_READY_FD");
    if (!ready || write(atoi(ready), "ready\n", 6) != 6) return 1;
    for (;;) pause();
}
