/* Preloaded into every process of a run: a disk that syncs slowly, and a wall clock that jumps.

   RLIF_FAULTS names a file of two doubles, which the test changes while the run goes on: seconds that each sync takes
   longer, and seconds that CLOCK_REALTIME is off. CLOCK_MONOTONIC is left alone, as it is when a real clock is set. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const volatile double *faults;

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("RLIF_FAULTS");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0)
        return;
    void *there = mmap(NULL, 2 * sizeof(double), PROT_READ, MAP_SHARED, file, 0);
    close(file);
    faults = there == MAP_FAILED ? NULL : there;
}

static void stall(void) {
    double seconds = faults ? faults[0] : 0;
    struct timespec left = {(time_t)seconds, (long)((seconds - (time_t)seconds) * 1e9)};
    if (seconds > 0)
        nanosleep(&left, NULL);
}

int fsync(int file) {
    stall();
    return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(file);
}

int fdatasync(int file) {
    stall();
    return ((int (*)(int))dlsym(RTLD_NEXT, "fdatasync"))(file);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real)
        real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(clock, now);
    if (!failed && faults && clock == CLOCK_REALTIME)
        now->tv_sec += (time_t)faults[1];
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    static int (*real)(struct timeval *, void *);
    if (!real)
        real = (int (*)(struct timeval *, void *))dlsym(RTLD_NEXT, "gettimeofday");
    int failed = real(now, zone);
    if (!failed && faults)
        now->tv_sec += (time_t)faults[1];
    return failed;
}

time_t time(time_t *out) {
    struct timeval now;
    gettimeofday(&now, NULL);
    if (out)
        *out = now.tv_sec;
    return now.tv_sec;
}
