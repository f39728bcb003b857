/* A disk that fails: between a process and libc, loaded with LD_PRELOAD.
 *
 * Sees what is written, synced, created, renamed and removed below one directory, whoever does it:
 * Python's os module, SQLite's own C. It can
 *   - keep a log of all that, from which `crashes.py` makes the disks that a power loss could have
 *     left behind at any moment;
 *   - let the n-th of the operations fail, be done by half, or be left undone in silence.
 *
 * Left alone is SQLite's -shm file: it is memory that connections share, and made anew after a crash.
 *
 * A log is a sequence of records: kind (u8), length of the path (u32), of the second path or of the
 * data (u32), offset or new size (u64), all little-endian; then the path, then the second path or
 * the data.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum kind { CREATE = 1, WRITE, TRUNCATE, SYNC, RENAME, REMOVE, MAKE_DIRECTORY, MARK };
enum fault { NONE, FAIL, FULL, SHORT, TEAR, DROP, DROP_ALL };

#define MAX_FD 4096
static char *paths[MAX_FD];
static char below[PATH_MAX];
static size_t below_length;
static int log_fd = -1;
static int armed = NONE;
static long countdown, counted;
static int dead;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

/* What the test calls, by ctypes. */

/* Act on what happens below this directory from now on; keep a log in that file, or none. */
void faults_watch(const char *directory, const char *log)
{
    pthread_mutex_lock(&lock);
    snprintf(below, sizeof below, "%s", directory);
    below_length = strlen(below);
    if (log_fd >= 0)
        close(log_fd);
    log_fd = log ? (int)syscall(SYS_open, log, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600) : -1;
    armed = NONE;
    dead = 0;
    counted = 0;
    pthread_mutex_unlock(&lock);
}

/* Let the n-th operation from now on, counted from 0, meet this fault. */
void faults_arm(int fault, long n)
{
    pthread_mutex_lock(&lock);
    armed = fault;
    countdown = n;
    counted = 0;
    dead = 0;
    pthread_mutex_unlock(&lock);
}

/* How many operations there were since the last call of the two above. */
long faults_counted(void)
{
    return counted;
}

static void record(enum kind kind, const char *path, const void *data, size_t length, uint64_t at)
{
    if (log_fd < 0)
        return;
    uint32_t path_length = (uint32_t)strlen(path), data_length = (uint32_t)length;
    unsigned char head[17] = {(unsigned char)kind};
    memcpy(head + 1, &path_length, 4);
    memcpy(head + 5, &data_length, 4);
    memcpy(head + 9, &at, 8);
    struct iovec parts[] = {
        {head, sizeof head}, {(void *)path, path_length}, {(void *)data, length}};
    if (syscall(SYS_writev, log_fd, parts, 3) < 0)
        abort();
}

/* Put a word into the log: what was acknowledged, for instance. */
void faults_mark(const char *word)
{
    pthread_mutex_lock(&lock);
    record(MARK, word, "", 0, 0);
    pthread_mutex_unlock(&lock);
}

/* Whether the operation that comes now is the one; counts it. Called with the lock held. */
static enum fault fate(void)
{
    if (dead)
        return armed;
    counted++;
    if (armed == NONE || countdown-- != 0)
        return NONE;
    if (armed == TEAR || armed == DROP_ALL)
        dead = 1;
    return armed;
}

/* Which file is meant. */

static int watched(const char *path)
{
    size_t length = strlen(path);
    if (length > 4 && strcmp(path + length - 4, "-shm") == 0)
        return 0;
    return below_length && strncmp(path, below, below_length) == 0 &&
           (path[below_length] == '/' || path[below_length] == 0);
}

/* The absolute path for a path relative to a directory's descriptor. */
static const char *absolute(int directory, const char *path, char *buffer)
{
    if (path[0] == '/')
        return path;
    if (directory >= 0 && directory < MAX_FD && paths[directory])
        snprintf(buffer, PATH_MAX, "%s/%s", paths[directory], path);
    else
        buffer[0] = 0;
    return buffer;
}

static const char *of(int fd)
{
    return fd >= 0 && fd < MAX_FD ? paths[fd] : NULL;
}

/* The operations. A torn or failing one does not go on; one that is dropped says that it did. */

static int opened(int directory, const char *path, int flags, mode_t mode)
{
    char buffer[PATH_MAX];
    const char *full = absolute(directory, path, buffer);
    if (!watched(full))
        return (int)syscall(SYS_openat, directory, path, flags, mode);
    pthread_mutex_lock(&lock);
    struct stat status;
    int new = (flags & O_CREAT) && stat(full, &status) != 0;
    int fd = -1;
    if (dead && (new || (flags & O_TRUNC))) {
        errno = EIO;
    } else {
        fd = (int)syscall(SYS_openat, directory, path, flags, mode);
        if (fd >= MAX_FD)
            abort();
        if (fd >= 0) {
            free(paths[fd]);
            paths[fd] = strdup(full);
            if (new)
                record(CREATE, full, "", 0, 0);
            else if (flags & O_TRUNC)
                record(TRUNCATE, full, "", 0, 0);
        }
    }
    int error = errno;
    pthread_mutex_unlock(&lock);
    errno = error;
    return fd;
}

static ssize_t written(int fd, const void *data, size_t length, off_t at)
{
    const char *path = of(fd);
    if (!path)
        return at < 0 ? syscall(SYS_write, fd, data, length)
                      : syscall(SYS_pwrite64, fd, data, length, at);
    pthread_mutex_lock(&lock);
    off_t where = at < 0 ? lseek(fd, 0, SEEK_CUR) : at;
    int was_dead = dead;
    ssize_t done = -1;
    size_t wanted = length;
    switch (fate()) {
    case FAIL:
        errno = EIO;
        break;
    case FULL:
        errno = ENOSPC;
        break;
    case DROP:
    case DROP_ALL:
        if (at < 0)
            lseek(fd, (off_t)length, SEEK_CUR);
        done = (ssize_t)length;
        break;
    case TEAR:
        if (was_dead) {
            errno = EIO;
            break;
        }
        wanted = length / 2;
        __attribute__((fallthrough));
    case SHORT:
        if (wanted == length && length > 1)
            wanted = length / 2;
        __attribute__((fallthrough));
    case NONE:
        done = syscall(SYS_pwrite64, fd, data, wanted, where);
        if (done >= 0) {
            record(WRITE, path, data, (size_t)done, (uint64_t)where);
            if (at < 0)
                lseek(fd, where + done, SEEK_SET);
        }
        if (dead) {
            errno = EIO;
            done = -1;
        }
    }
    int error = errno;
    pthread_mutex_unlock(&lock);
    errno = error;
    return done;
}

static int synced(int fd, long call)
{
    const char *path = of(fd);
    if (!path)
        return (int)syscall(call, fd);
    pthread_mutex_lock(&lock);
    int done = 0;
    switch (fate()) {
    case FAIL:
    case FULL:
    case TEAR:
        errno = EIO;
        done = -1;
        break;
    case DROP:
    case DROP_ALL:
        break;
    case SHORT:
    case NONE:
        /* The disk itself need not be waited for: a log or a fault takes its place. */
        record(SYNC, path, "", 0, 0);
    }
    int error = errno;
    pthread_mutex_unlock(&lock);
    errno = error;
    return done;
}

static int resized(int fd, off_t size)
{
    const char *path = of(fd);
    if (!path)
        return (int)syscall(SYS_ftruncate, fd, size);
    pthread_mutex_lock(&lock);
    int done = 0;
    if (dead && armed == TEAR) {
        errno = EIO;
        done = -1;
    } else if (!dead) {
        done = (int)syscall(SYS_ftruncate, fd, size);
        if (done == 0)
            record(TRUNCATE, path, "", 0, (uint64_t)size);
    }
    int error = errno;
    pthread_mutex_unlock(&lock);
    errno = error;
    return done;
}

static int removed(int directory, const char *path, int flags)
{
    char buffer[PATH_MAX];
    const char *full = absolute(directory, path, buffer);
    if (!watched(full))
        return (int)syscall(SYS_unlinkat, directory, path, flags);
    pthread_mutex_lock(&lock);
    int done = 0;
    if (dead && armed == TEAR) {
        errno = EIO;
        done = -1;
    } else if (!dead) {
        done = (int)syscall(SYS_unlinkat, directory, path, flags);
        if (done == 0)
            record(REMOVE, full, "", 0, 0);
    }
    int error = errno;
    pthread_mutex_unlock(&lock);
    errno = error;
    return done;
}

static int renamed(int old_directory, const char *old, int new_directory, const char *new)
{
    char old_buffer[PATH_MAX], new_buffer[PATH_MAX];
    const char *old_full = absolute(old_directory, old, old_buffer);
    const char *new_full = absolute(new_directory, new, new_buffer);
    if (!watched(old_full) && !watched(new_full))
        return (int)syscall(SYS_renameat, old_directory, old, new_directory, new);
    pthread_mutex_lock(&lock);
    int done = 0;
    if (dead && armed == TEAR) {
        errno = EIO;
        done = -1;
    } else if (!dead) {
        done = (int)syscall(SYS_renameat, old_directory, old, new_directory, new);
        if (done == 0) {
            record(RENAME, old_full, new_full, strlen(new_full), 0);
            for (int fd = 0; fd < MAX_FD; fd++)
                if (paths[fd] && strcmp(paths[fd], old_full) == 0) {
                    free(paths[fd]);
                    paths[fd] = strdup(new_full);
                }
        }
    }
    int error = errno;
    pthread_mutex_unlock(&lock);
    errno = error;
    return done;
}

/* The names that libc has for them. */

#define MODE(flags, mode)                                                                          \
    mode_t mode = 0;                                                                               \
    if ((flags) & (O_CREAT | __O_TMPFILE)) {                                                       \
        va_list rest;                                                                              \
        va_start(rest, flags);                                                                     \
        mode = va_arg(rest, mode_t);                                                               \
        va_end(rest);                                                                              \
    }

int open(const char *path, int flags, ...)
{
    MODE(flags, mode)
    return opened(AT_FDCWD, path, flags, mode);
}

int open64(const char *path, int flags, ...)
{
    MODE(flags, mode)
    return opened(AT_FDCWD, path, flags, mode);
}

int openat(int directory, const char *path, int flags, ...)
{
    MODE(flags, mode)
    return opened(directory, path, flags, mode);
}

int openat64(int directory, const char *path, int flags, ...)
{
    MODE(flags, mode)
    return opened(directory, path, flags, mode);
}

int close(int fd)
{
    if (of(fd)) {
        pthread_mutex_lock(&lock);
        free(paths[fd]);
        paths[fd] = NULL;
        pthread_mutex_unlock(&lock);
    }
    return REAL(close)(fd);
}

ssize_t write(int fd, const void *data, size_t length)
{
    return written(fd, data, length, -1);
}

ssize_t pwrite(int fd, const void *data, size_t length, off_t at)
{
    return written(fd, data, length, at);
}

ssize_t pwrite64(int fd, const void *data, size_t length, off64_t at)
{
    return written(fd, data, length, at);
}

int fsync(int fd)
{
    return synced(fd, SYS_fsync);
}

int fdatasync(int fd)
{
    return synced(fd, SYS_fdatasync);
}

int ftruncate(int fd, off_t size)
{
    return resized(fd, size);
}

int ftruncate64(int fd, off64_t size)
{
    return resized(fd, size);
}

int unlink(const char *path)
{
    return removed(AT_FDCWD, path, 0);
}

int unlinkat(int directory, const char *path, int flags)
{
    return removed(directory, path, flags);
}

int rmdir(const char *path)
{
    return removed(AT_FDCWD, path, AT_REMOVEDIR);
}

int rename(const char *old, const char *new)
{
    return renamed(AT_FDCWD, old, AT_FDCWD, new);
}

int renameat(int old_directory, const char *old, int new_directory, const char *new)
{
    return renamed(old_directory, old, new_directory, new);
}

int mkdirat(int directory, const char *path, mode_t mode)
{
    char buffer[PATH_MAX];
    const char *full = absolute(directory, path, buffer);
    int done = (int)syscall(SYS_mkdirat, directory, path, mode);
    if (done == 0 && watched(full)) {
        pthread_mutex_lock(&lock);
        record(MAKE_DIRECTORY, full, "", 0, 0);
        pthread_mutex_unlock(&lock);
    }
    return done;
}

int mkdir(const char *path, mode_t mode)
{
    return mkdirat(AT_FDCWD, path, mode);
}

/* Ways to write that nothing here uses: should that change, the tests are to fail, not to be blind. */

ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t at)
{
    if (of(fd))
        abort();
    return syscall(SYS_pwritev, fd, parts, count, (long)at, 0L);
}

ssize_t writev(int fd, const struct iovec *parts, int count)
{
    if (of(fd))
        abort();
    return syscall(SYS_writev, fd, parts, count);
}

ssize_t copy_file_range(int in, off64_t *at, int out, off64_t *to, size_t length, unsigned flags)
{
    if (of(out))
        abort();
    return syscall(SYS_copy_file_range, in, at, out, to, length, flags);
}

int fallocate(int fd, int mode, off_t at, off_t length)
{
    if (of(fd))
        abort();
    return (int)syscall(SYS_fallocate, fd, mode, at, length);
}
