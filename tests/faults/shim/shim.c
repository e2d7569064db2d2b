/* Stands between a process and libc's file and clock functions (LD_PRELOAD) and fails the n-th operation on files under
 * a folder: with an error, for good as a full or dead disk does, or by a kill. Python, Arrow's C++ and SQLite go through
 * the same functions. Not seen: stdio, writes through mmap (SQLite's -shm), and processes that the process starts.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum kind { NONE, NO_SPACE, IO_ERROR, FULL_DISK, DEAD_DISK, KILL, KILL_HALFWAY };
enum needs { NO_ROOM, ROOM }; /* whether a full disk refuses it */

/* In memory that the process shares with the one it was forked from, which reads it when this one is dead. */
struct state {
    atomic_long count; /* operations seen */
    atomic_long fired; /* operations that failed */
    atomic_long jumps; /* of the clock */
    char what[PATH_MAX + 64]; /* the first of them */
};

static struct state *state;
static char root[PATH_MAX];
static size_t root_length; /* 0: not armed */
static enum kind kind;
static long at;
static int reads, coarse, trace = -1;
static char last_written[PATH_MAX]; /* the file of the operation before, if that was a write */
static long writes; /* how many there were in a row */
static atomic_ullong clock_random; /* 0: clocks are true */
static atomic_llong clock_offset;

__attribute__((constructor)) static void start(void) {
    state = mmap(NULL, sizeof *state, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
}

/* ---------------------------------------------------------------------------------------------------- controls */

struct state *shim_state(void) { return state; }

/* From here on count what happens under `folder`: reading operations if `only_reads`, else the changing ones; the
 * `number`-th fails as `how` says. `leave_out`: of many writes in a row to one file only the first two and every 16th
 * count. `trace_to`: a file that gets a line per operation, or -1. */
void shim_arm(const char *folder, int how, long number, int only_reads, int leave_out, int trace_to) {
    kind = how;
    at = number;
    reads = only_reads;
    coarse = leave_out;
    trace = trace_to;
    strncpy(root, folder, sizeof root - 1);
    root_length = strlen(root);
}

/* From here on the time of day jumps by up to an hour to either side, every 16th look at it on average. */
void shim_jumping_clock(unsigned long long seed) { clock_random = seed * 2 + 1; }

/* ------------------------------------------------------------------------------------------------------- paths */

static int under_root(const char *path) {
    return strncmp(path, root, root_length) == 0 && (path[root_length] == '/' || path[root_length] == 0);
}

static const char *of_descriptor(int fd, char *buffer) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = syscall(SYS_readlink, link, buffer, PATH_MAX - 1);
    buffer[length < 0 ? 0 : length] = 0;
    return buffer;
}

static const char *absolute(int folder, const char *path, char *buffer) {
    if (root_length == 0 || path[0] == '/') return path;
    if (folder != AT_FDCWD) of_descriptor(folder, buffer);
    else if (getcwd(buffer, PATH_MAX) == NULL) return path;
    size_t length = strlen(buffer);
    snprintf(buffer + length, PATH_MAX - length, "/%s", path);
    return buffer;
}

/* ------------------------------------------------------------------------------------------------------ faults */

static void die(void) {
    syscall(SYS_kill, syscall(SYS_getpid), SIGKILL);
    for (;;) pause();
}

static void note(const char *name, const char *path, const char *other) {
    if (trace < 0) return;
    char line[2 * PATH_MAX + 64];
    int length = snprintf(line, sizeof line, "%s\t%s\t%s\n", name, path, other == NULL ? "" : other);
    syscall(SYS_write, trace, line, (size_t)length);
}

/* Whether the operation counts; threads may disagree on it, which costs nothing but a number. */
static int counts(const char *name, const char *path) {
    if (strcmp(name, "write") != 0 || strcmp(path, last_written) != 0) {
        writes = 0;
        snprintf(last_written, sizeof last_written, "%s", strcmp(name, "write") == 0 ? path : "");
        return 1;
    }
    writes++;
    return !coarse || writes == 1 || writes % 16 == 0;
}

/* What an operation has to do: 0 go on, an errno to fail with, or -1 for half of it, after which the process is killed
 * (KILL_HALFWAY) or goes on on a full disk. */
static int strike(const char *name, const char *path, const char *other, enum needs needs, int is_read) {
    if (root_length == 0 || is_read != reads) return 0;
    if (!under_root(path) && (other == NULL || !under_root(other))) return 0;
    int is_counted = counts(name, path);
    long number = is_counted ? atomic_fetch_add(&state->count, 1) + 1 : state->count;
    int lasts = kind == FULL_DISK || kind == DEAD_DISK;
    note(name, path, other);
    if (kind == NONE || at == 0 || number < at) return 0;
    if ((number > at || !is_counted) && !lasts) return 0;
    if (kind == FULL_DISK && needs != ROOM) return 0;
    if (atomic_fetch_add(&state->fired, 1) == 0)
        snprintf(state->what, sizeof state->what, "%s %.4000s", name, path + (under_root(path) ? root_length : 0));
    switch (kind) {
    case KILL: die(); return 0;
    case KILL_HALFWAY: return -1;
    case FULL_DISK: return state->fired == 1 ? -1 : ENOSPC;
    case NO_SPACE: return ENOSPC;
    default: return EIO;
    }
}

/* An operation that is done or not done; halfway: done, and then the kill. */
#define WHOLE(name, path, other, needs, is_read, call)                                                                 \
    do {                                                                                                               \
        int failure = strike(name, path, other, needs, is_read);                                                       \
        if (failure > 0 || (failure < 0 && kind == FULL_DISK)) {                                                       \
            errno = failure > 0 ? failure : ENOSPC;                                                                    \
            return -1;                                                                                                 \
        }                                                                                                              \
        __typeof__(call) done = call;                                                                                  \
        if (failure < 0) die();                                                                                        \
        return done;                                                                                                   \
    } while (0)

#define REAL(type, name, ...)                                                                                          \
    static type (*real)(__VA_ARGS__);                                                                                  \
    if (real == NULL) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

/* ------------------------------------------------------------------------------------------------------- files */

static int open_any(const char *name, int folder, const char *path, int flags, mode_t mode) {
    REAL(int, "openat64", int, const char *, int, ...);
    char buffer[PATH_MAX];
    const char *full = absolute(folder, path, buffer);
    int changes = (flags & O_ACCMODE) != O_RDONLY || flags & (O_CREAT | O_TRUNC);
    enum needs needs = flags & O_CREAT && root_length != 0 && access(full, F_OK) != 0 ? ROOM : NO_ROOM;
    WHOLE(flags & O_TRUNC ? "open_truncating" : name, full, NULL, needs, !changes, real(folder, path, flags, mode));
}

#define MODE                                                                                                           \
    mode_t mode = 0;                                                                                                   \
    if (flags & (O_CREAT | O_TMPFILE)) {                                                                               \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        mode = va_arg(rest, mode_t);                                                                                   \
        va_end(rest);                                                                                                  \
    }

int open(const char *path, int flags, ...) { MODE return open_any("open", AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE return open_any("open", AT_FDCWD, path, flags, mode); }
int openat(int at, const char *path, int flags, ...) { MODE return open_any("open", at, path, flags, mode); }
int openat64(int at, const char *path, int flags, ...) { MODE return open_any("open", at, path, flags, mode); }
int creat(const char *path, mode_t mode) { return open_any("open", AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) { return creat(path, mode); }

#define WRITE(fd, bytes, call, half)                                                                                   \
    char buffer[PATH_MAX];                                                                                             \
    int failure = root_length == 0 ? 0 : strike("write", of_descriptor(fd, buffer), NULL, ROOM, 0);                    \
    if (failure > 0) {                                                                                                 \
        errno = failure;                                                                                               \
        return -1;                                                                                                     \
    }                                                                                                                  \
    if (failure == 0) return call;                                                                                     \
    ssize_t done = (bytes) > 1 ? half : 0;                                                                             \
    if (kind == KILL_HALFWAY) die();                                                                                   \
    if (done == 0) {                                                                                                   \
        errno = ENOSPC;                                                                                                \
        return -1;                                                                                                     \
    }                                                                                                                  \
    return done

ssize_t write(int fd, const void *data, size_t size) {
    REAL(ssize_t, "write", int, const void *, size_t);
    WRITE(fd, size, real(fd, data, size), real(fd, data, size / 2));
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) {
    REAL(ssize_t, "pwrite64", int, const void *, size_t, off64_t);
    WRITE(fd, size, real(fd, data, size, offset), real(fd, data, size / 2, offset));
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) { return pwrite64(fd, data, size, offset); }

ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL(ssize_t, "writev", int, const struct iovec *, int);
    WRITE(fd, parts[0].iov_len, real(fd, parts, count), write(fd, parts[0].iov_base, parts[0].iov_len / 2));
}

/* The system's own sync is left out: no test takes the power away, and it is most of the time of a run. */
static int sync_any(const char *name, int fd) {
    REAL(int, "fsync", int);
    char buffer[PATH_MAX];
    const char *path = root_length == 0 ? "" : of_descriptor(fd, buffer);
    WHOLE(name, path, NULL, NO_ROOM, 0, root_length != 0 && under_root(path) ? 0 : real(fd));
}

int fsync(int fd) { return sync_any("fsync", fd); }
int fdatasync(int fd) { return sync_any("fsync", fd); }

int ftruncate64(int fd, off64_t size) {
    REAL(int, "ftruncate64", int, off64_t);
    char buffer[PATH_MAX];
    WHOLE("truncate", root_length == 0 ? "" : of_descriptor(fd, buffer), NULL, NO_ROOM, 0, real(fd, size));
}

int ftruncate(int fd, off_t size) { return ftruncate64(fd, size); }

int truncate64(const char *path, off64_t size) {
    REAL(int, "truncate64", const char *, off64_t);
    char buffer[PATH_MAX];
    WHOLE("truncate", absolute(AT_FDCWD, path, buffer), NULL, NO_ROOM, 0, real(path, size));
}

int renameat2(int from_at, const char *from, int to_at, const char *to, unsigned flags) {
    char one[PATH_MAX], other[PATH_MAX];
    const char *source = absolute(from_at, from, one), *target = absolute(to_at, to, other);
    WHOLE("rename", source, target, NO_ROOM, 0, (int)syscall(SYS_renameat2, from_at, from, to_at, to, flags));
}

int renameat(int from_at, const char *from, int to_at, const char *to) { return renameat2(from_at, from, to_at, to, 0); }
int rename(const char *from, const char *to) { return renameat2(AT_FDCWD, from, AT_FDCWD, to, 0); }

int unlinkat(int folder, const char *path, int flags) {
    char buffer[PATH_MAX];
    const char *name = flags & AT_REMOVEDIR ? "rmdir" : "unlink", *full = absolute(folder, path, buffer);
    WHOLE(name, full, NULL, NO_ROOM, 0, (int)syscall(SYS_unlinkat, folder, path, flags));
}

int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

int mkdirat(int folder, const char *path, mode_t mode) {
    char buffer[PATH_MAX];
    const char *full = absolute(folder, path, buffer);
    if (access(full, F_OK) == 0) { /* asked for only in case that it is missing: changes nothing */
        errno = EEXIST;
        return -1;
    }
    WHOLE("mkdir", full, NULL, ROOM, 0, (int)syscall(SYS_mkdirat, folder, path, mode));
}

int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

int symlinkat(const char *target, int folder, const char *path) {
    char buffer[PATH_MAX];
    const char *full = absolute(folder, path, buffer);
    WHOLE("symlink", full, NULL, ROOM, 0, (int)syscall(SYS_symlinkat, target, folder, path));
}

int symlink(const char *target, const char *path) { return symlinkat(target, AT_FDCWD, path); }

ssize_t read(int fd, void *data, size_t size) {
    REAL(ssize_t, "read", int, void *, size_t);
    char buffer[PATH_MAX];
    WHOLE("read", root_length == 0 ? "" : of_descriptor(fd, buffer), NULL, NO_ROOM, 1, real(fd, data, size));
}

ssize_t pread64(int fd, void *data, size_t size, off64_t offset) {
    REAL(ssize_t, "pread64", int, void *, size_t, off64_t);
    char buffer[PATH_MAX];
    WHOLE("read", root_length == 0 ? "" : of_descriptor(fd, buffer), NULL, NO_ROOM, 1, real(fd, data, size, offset));
}

ssize_t pread(int fd, void *data, size_t size, off_t offset) { return pread64(fd, data, size, offset); }

/* ------------------------------------------------------------------------------------------------------ clocks */

/* Nanoseconds that the time of day is off at this look. */
static long long jump(void) {
    unsigned long long random = clock_random;
    if (random == 0) return 0;
    random ^= random << 13;
    random ^= random >> 7;
    random ^= random << 17;
    clock_random = random;
    if ((random >> 20) % 16 == 0) {
        clock_offset = ((long long)(random >> 24) % 7200000 - 3600000) * 1000000;
        atomic_fetch_add(&state->jumps, 1);
    }
    return clock_offset;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int done = (int)syscall(SYS_clock_gettime, clock, now);
    if (done == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) {
        long long shifted = now->tv_sec * 1000000000LL + now->tv_nsec + jump();
        now->tv_sec = shifted / 1000000000LL;
        now->tv_nsec = shifted % 1000000000LL;
    }
    return done;
}

int gettimeofday(struct timeval *now, void *zone) {
    struct timespec exact;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &exact);
    now->tv_sec = exact.tv_sec;
    now->tv_usec = exact.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *result) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    if (result != NULL) *result = exact.tv_sec;
    return exact.tv_sec;
}
