/* Preloaded into a process (LD_PRELOAD): numbers its file operations that write below a folder, and at one of them kills
 * its process group or fails with an error. Linux, glibc.
 *
 * $FAULTS_ROOT: the folder. $FAULTS_CONTROL: a file of `struct control`, shared by all processes; beside it, NAME.log
 * gets a line per operation: slot, number, operation, path. The slot is 0, or 1 + $RANK in a rank of a distributed run:
 * each slot is numbered apart, as the order of operations of two ranks is no fixed one.
 *
 * Not seen: writes to mapped memory, and those that the C library makes for its own streams other than by fwrite.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { RECORD, KILL, FAIL, FILL }; /* FILL: a disk that becomes full during a write */

struct control {
    long count[64];
    long slot, at, action, error;
    long sticky; /* all later operations fail, too, that can fail so: a full disk stays full */
    long fired;
};

static struct control *control;
static char root[1024];
static int log_file = -1, slot;

void faults_attach(void) { /* reads the environment: at the start of a program, and after a fork that changed it */
    const char *path = getenv("FAULTS_CONTROL"), *folder = getenv("FAULTS_ROOT"), *rank = getenv("RANK");
    control = NULL;
    if (!path || !folder || strlen(folder) >= sizeof root) return;
    strcpy(root, folder);
    slot = rank ? 1 + atoi(rank) : 0;
    int file = syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC);
    if (file < 0 || slot >= 64) return;
    void *shared = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    syscall(SYS_close, file);
    char name[1100];
    snprintf(name, sizeof name, "%s.log", path);
    file = syscall(SYS_openat, AT_FDCWD, name, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    log_file = fcntl(file, F_DUPFD_CLOEXEC, 1000);
    syscall(SYS_close, file);
    if (shared != MAP_FAILED) control = shared;
}

__attribute__((constructor)) static void start(void) { faults_attach(); }

static const char *below(const char *path) { /* the path relative to the root; NULL outside */
    size_t n = strlen(root);
    return !strncmp(path, root, n) && path[n] == '/' ? path + n + 1 : NULL;
}

static const char *path_of(int folder, const char *path, char *full) {
    char link[40];
    ssize_t n = 0;
    if (!path || path[0] != '/') { /* path NULL: the open file `folder` */
        snprintf(link, sizeof link, folder == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", folder);
        if ((n = readlink(link, full, 1000)) < 0) return NULL;
        if (path) full[n++] = '/';
    }
    snprintf(full + n, 2000 - n, "%s", path ? path : "");
    return below(full);
}

int faults_can_fail(const char *op, long error) {
    int is_write = strstr("write pwrite writev fwrite sendfile copy_file_range fsync fallocate", op) != NULL;
    int grows = is_write || strstr("create mkdir rename link symlink ftruncate", op) != NULL;
    return error == ENOSPC ? grows : error == EACCES ? !is_write && strcmp(op, "ftruncate") : 1;
}

/* What this operation does: RECORD (as ever), KILL, or FAIL or FILL with errno set. */
static int number(const char *op, int folder, const char *path) {
    char full[2048], line[2300];
    int before = errno;
    const char *name;
    if (!control || !(name = path_of(folder, path, full))) return errno = before, RECORD;
    long n = __atomic_add_fetch(&control->count[slot], 1, __ATOMIC_SEQ_CST);
    int size = snprintf(line, sizeof line, "%d\t%ld\t%s\t%s\n", slot, n, op, name);
    syscall(SYS_write, log_file, line, size);
    int now = control->action != RECORD && n == control->at && slot == control->slot;
    int later = control->fired && control->sticky && faults_can_fail(op, control->error) && strcmp(name, "console.txt");
    errno = before;
    if (!now && !later) return RECORD;
    if (now) control->fired = 1;
    if (control->action == KILL) return KILL;
    return errno = control->error, now && control->sticky ? FILL : FAIL;
}

static int end(void) {
    kill(0, SIGKILL);
    pause();
    return -1;
}

#define NEXT(name) \
    static __typeof__(name) *next; \
    if (!next) next = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

/* One operation: as ever, or killed before it, or failed. */
#define ACT(op, folder, path, call) \
    switch (number(op, folder, path)) { \
    case RECORD: return call; \
    case KILL: return end(); \
    default: return -1; \
    }

static int exists(int folder, const char *path) {
    struct stat found;
    int before = errno, is = !fstatat(folder, path, &found, AT_SYMLINK_NOFOLLOW);
    errno = before;
    return is;
}

static const char *opening(int folder, const char *path, int flags) { /* NULL: only reads */
    if (!(flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC))) return NULL;
    return flags & O_CREAT && !exists(folder, path) ? "create" : "open";
}

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        va_list more; \
        va_start(more, flags); \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0; \
        va_end(more); \
        NEXT(name); \
        const char *op = opening(AT_FDCWD, path, flags); \
        if (!op) return next(path, flags, mode); \
        ACT(op, AT_FDCWD, path, next(path, flags, mode)) \
    }
#define OPENAT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        va_list more; \
        va_start(more, flags); \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0; \
        va_end(more); \
        NEXT(name); \
        const char *op = opening(folder, path, flags); \
        if (!op) return next(folder, path, flags, mode); \
        ACT(op, folder, path, next(folder, path, flags, mode)) \
    }
#define CREAT(name) \
    int name(const char *path, mode_t mode) { \
        NEXT(name); \
        ACT(exists(AT_FDCWD, path) ? "open" : "create", AT_FDCWD, path, next(path, mode)) \
    }
#define FOPEN(name) \
    FILE *name(const char *path, const char *mode) { \
        NEXT(name); \
        if (!strpbrk(mode, "wa+")) return next(path, mode); \
        int what = number(exists(AT_FDCWD, path) ? "open" : "create", AT_FDCWD, path); \
        if (what == KILL) end(); \
        return what == RECORD ? next(path, mode) : NULL; \
    }
OPEN(open) OPEN(open64) OPENAT(openat) OPENAT(openat64) CREAT(creat) CREAT(creat64) FOPEN(fopen) FOPEN(fopen64)

/* Writes: before a kill, and into a disk that becomes full, the first half of the bytes is written. */
#define WRITE(op, file, half, whole, size) \
    switch (number(op, file, NULL)) { \
    case RECORD: return whole; \
    case KILL: return (void)!half, end(); \
    case FILL: return size > 1 ? half : -1; \
    default: return -1; \
    }

ssize_t write(int file, const void *bytes, size_t size) {
    NEXT(write);
    WRITE("write", file, next(file, bytes, size / 2), next(file, bytes, size), size)
}
#define PWRITE(name, offset_type) \
    ssize_t name(int file, const void *bytes, size_t size, offset_type at) { \
        NEXT(name); \
        WRITE("pwrite", file, next(file, bytes, size / 2, at), next(file, bytes, size, at), size) \
    }
PWRITE(pwrite, off_t) PWRITE(pwrite64, off64_t)
ssize_t writev(int file, const struct iovec *parts, int n) {
    NEXT(writev);
    WRITE("writev", file, next(file, parts, n / 2), next(file, parts, n), n)
}
size_t fwrite(const void *bytes, size_t size, size_t n, FILE *file) {
    NEXT(fwrite);
    switch (number("fwrite", fileno(file), NULL)) {
    case RECORD: return next(bytes, size, n, file);
    case KILL: return next(bytes, size, n / 2, file), fflush(file), end();
    case FILL: return next(bytes, size, n / 2, file);
    default: return 0;
    }
}
#define SENDFILE(name, offset_type) \
    ssize_t name(int to, int from, offset_type *at, size_t size) { \
        NEXT(name); \
        WRITE("sendfile", to, next(to, from, at, size / 2), next(to, from, at, size), size) \
    }
SENDFILE(sendfile, off_t) SENDFILE(sendfile64, off64_t)
ssize_t copy_file_range(int from, off64_t *at, int to, off64_t *to_at, size_t size, unsigned flags) {
    NEXT(copy_file_range);
    WRITE("copy_file_range", to, next(from, at, to, to_at, size / 2, flags), next(from, at, to, to_at, size, flags), size)
}

int fsync(int file) { NEXT(fsync); ACT("fsync", file, NULL, next(file)) }
int fdatasync(int file) { NEXT(fdatasync); ACT("fsync", file, NULL, next(file)) }
int ftruncate(int file, off_t size) { NEXT(ftruncate); ACT("ftruncate", file, NULL, next(file, size)) }
int ftruncate64(int file, off64_t size) { NEXT(ftruncate64); ACT("ftruncate", file, NULL, next(file, size)) }
int fallocate(int file, int mode, off_t at, off_t size) {
    NEXT(fallocate);
    ACT("fallocate", file, NULL, next(file, mode, at, size))
}
#define FALLOCATE(name, offset_type) \
    int name(int file, offset_type at, offset_type size) { /* returns the error */ \
        NEXT(name); \
        int what = number("fallocate", file, NULL); \
        return what == RECORD ? next(file, at, size) : what == KILL ? end() : errno; \
    }
FALLOCATE(posix_fallocate, off_t) FALLOCATE(posix_fallocate64, off64_t)

int rename(const char *from, const char *to) { NEXT(rename); ACT("rename", AT_FDCWD, to, next(from, to)) }
int renameat(int here, const char *from, int there, const char *to) {
    NEXT(renameat);
    ACT("rename", there, to, next(here, from, there, to))
}
int renameat2(int here, const char *from, int there, const char *to, unsigned flags) {
    NEXT(renameat2);
    ACT("rename", there, to, next(here, from, there, to, flags))
}
int link(const char *from, const char *to) { NEXT(link); ACT("link", AT_FDCWD, to, next(from, to)) }
int linkat(int here, const char *from, int there, const char *to, int flags) {
    NEXT(linkat);
    ACT("link", there, to, next(here, from, there, to, flags))
}
int symlink(const char *to, const char *path) { NEXT(symlink); ACT("symlink", AT_FDCWD, path, next(to, path)) }
int symlinkat(const char *to, int folder, const char *path) {
    NEXT(symlinkat);
    ACT("symlink", folder, path, next(to, folder, path))
}
int chmod(const char *path, mode_t mode) { NEXT(chmod); ACT("chmod", AT_FDCWD, path, next(path, mode)) }
int fchmod(int file, mode_t mode) { NEXT(fchmod); ACT("chmod", file, NULL, next(file, mode)) }
int fchmodat(int folder, const char *path, mode_t mode, int flags) {
    NEXT(fchmodat);
    ACT("chmod", folder, path, next(folder, path, mode, flags))
}

/* Those that find nothing to do are not numbered. */
#define IF(condition, op, folder, path, call) \
    if (!(condition)) return call; \
    ACT(op, folder, path, call)
int mkdir(const char *path, mode_t mode) {
    NEXT(mkdir);
    IF(!exists(AT_FDCWD, path), "mkdir", AT_FDCWD, path, next(path, mode))
}
int mkdirat(int folder, const char *path, mode_t mode) {
    NEXT(mkdirat);
    IF(!exists(folder, path), "mkdir", folder, path, next(folder, path, mode))
}
int unlink(const char *path) {
    NEXT(unlink);
    IF(exists(AT_FDCWD, path), "unlink", AT_FDCWD, path, next(path))
}
int unlinkat(int folder, const char *path, int flags) {
    NEXT(unlinkat);
    IF(exists(folder, path), flags & AT_REMOVEDIR ? "rmdir" : "unlink", folder, path, next(folder, path, flags))
}
int remove(const char *path) { NEXT(remove); IF(exists(AT_FDCWD, path), "unlink", AT_FDCWD, path, next(path)) }
int rmdir(const char *path) { NEXT(rmdir); IF(exists(AT_FDCWD, path), "rmdir", AT_FDCWD, path, next(path)) }
