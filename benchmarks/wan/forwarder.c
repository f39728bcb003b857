/* A long link between two network namespaces: what the kernel's netem does, where there is none.
 *
 *   forwarder -A NAMESPACE -B NAMESPACE -d DELAY_NS -r BITS_PER_SECOND -q QUEUE_BYTES
 *             [-l LOSS] [-L BURST_LOSS -n BURST_LENGTH] [-s SEED]
 *
 * It makes a TUN device `wan0` in each namespace, prints "ready", and carries IP packets from the
 * one to the other until SIGTERM, when it prints what it did as JSON. Each direction is a line of
 * its own, with the same figures:
 *
 *   arrives -> lost by chance? -> queue full? -> serialised at the rate -> delayed -> delivered
 *
 * As in netem, what is lost takes no time on the line. A packet leaves the queue when the one before
 * it has left and its own bits are through, and is due a constant delay later, so that packets are
 * due in the order in which they came: a ring holds them. The bytes that wait are what the line
 * would still serialise from now on; no second account of them is kept.
 *
 * After a turn in which there was something to do it sleeps for TURN_NS, whatever arrives
 * meanwhile: thus a gigabit per second costs few wake-ups, and a packet is late by so much at most.
 * Otherwise it sleeps until a packet arrives or is due, and an idle link costs nothing. It runs
 * before ordinary processes, as a network would, or their load would be taken for the link's delay.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#define SECOND UINT64_C(1000000000)
/* Bounds how late a packet is, and how often a busy forwarder wakes up. */
#define TURN_NS UINT64_C(50000)
/* Packets that one direction takes in a turn, so that it doesn't keep the other waiting. */
#define TAKEN_AT_ONCE 256
/* Holds a packet of the MTU, 1,500 bytes; longer ones don't come. */
#define SLOT 1536
/* The average packet, for the number of slots. Data are longer, and their acknowledgements fewer. */
#define AVERAGE 512

struct line_options {
    uint64_t delay;        /* ns */
    double rate;           /* bits per second */
    double queue;          /* bytes */
    double loss;           /* probability */
    double burst_begins;   /* probability, for each packet outside a burst */
    double burst_ends;     /* probability, after each packet of a burst */
};

struct packet {
    uint64_t due;
    uint32_t slot;
    uint32_t size;
};

struct line {
    const struct line_options *options;
    int from, to;
    uint64_t random;       /* state of the generator */
    bool in_burst;
    double free_at;        /* ns: when what was accepted so far is through */
    uint32_t capacity;     /* slots */
    uint32_t first, count; /* of the ring */
    struct packet *ring;
    uint32_t *free_slots;  /* a stack, so that memory used last, and cached, is used first */
    char *memory;
    uint64_t packets, bytes, delivered, lost, lost_in_bursts, dropped, overrun, failed;
    double longest_queue;  /* bytes */
    uint64_t latest, late; /* ns: the greatest, and the sum */
};

static volatile sig_atomic_t stopped;

static void stop(int signal) {
    (void)signal;
    stopped = 1;
}

static void fail(const char *what) {
    fprintf(stderr, "forwarder: %s: %s\n", what, strerror(errno));
    exit(1);
}

static uint64_t clock_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * SECOND + (uint64_t)now.tv_nsec;
}

/* A number in [0, 1): a Weyl sequence, mixed by multiplications (Steele et al., SplitMix, 2014). */
static double chance(struct line *line) {
    uint64_t mixed = line->random += UINT64_C(0x9E3779B97F4A7C15);
    mixed = (mixed ^ (mixed >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
    mixed = (mixed ^ (mixed >> 27)) * UINT64_C(0x94D049BB133111EB);
    mixed ^= mixed >> 31;
    return (double)(mixed >> 11) * 0x1p-53;
}

/* Draw whether a packet is lost: two numbers for every packet, so that those that follow meet the
 * same fate whatever became of it. Bursts are those of Gilbert: inside of one all packets are lost. */
static bool is_lost(struct line *line) {
    const struct line_options *options = line->options;
    double alone = chance(line), burst = chance(line);
    line->in_burst = line->in_burst ? burst >= options->burst_ends : burst < options->burst_begins;
    if (line->in_burst)
        line->lost_in_bursts++;
    else if (alone < options->loss)
        line->lost++;
    else
        return false;
    return true;
}

/* Accept what has arrived; return whether there was anything. */
static bool take(struct line *line, uint64_t now) {
    const struct line_options *options = line->options;
    char surplus[SLOT];
    int taken = 0;
    for (; taken < TAKEN_AT_ONCE; taken++) {
        bool room = line->count < line->capacity;
        uint32_t slot = room ? line->free_slots[line->count] : 0;
        ssize_t size = read(line->from, room ? line->memory + (size_t)slot * SLOT : surplus, SLOT);
        if (size <= 0)
            break;
        line->packets++;
        line->bytes += (uint64_t)size;
        if (is_lost(line))
            continue;
        double begins = line->free_at > (double)now ? line->free_at : (double)now;
        double waiting = (begins - (double)now) * options->rate / 8e9 + (double)size;
        if (waiting > options->queue) {
            line->dropped++;
            continue;
        }
        if (!room) {
            line->overrun++;
            continue;
        }
        if (waiting > line->longest_queue)
            line->longest_queue = waiting;
        line->free_at = begins + (double)size * 8e9 / options->rate;
        uint32_t place = (line->first + line->count++) % line->capacity;
        line->ring[place] = (struct packet){
            (uint64_t)line->free_at + options->delay, slot, (uint32_t)size};
    }
    return taken > 0;
}

/* Deliver what is due; return whether there was anything. */
static bool deliver(struct line *line) {
    uint32_t before = line->count;
    uint64_t now = clock_ns();
    while (line->count && line->ring[line->first].due <= now) {
        struct packet *packet = &line->ring[line->first];
        const char *data = line->memory + (size_t)packet->slot * SLOT;
        if (write(line->to, data, packet->size) == (ssize_t)packet->size)
            line->delivered++;
        else
            line->failed++;
        uint64_t late = now - packet->due;
        line->late += late;
        if (late > line->latest)
            line->latest = late;
        line->free_slots[--line->count] = packet->slot;
        line->first = (line->first + 1) % line->capacity;
        now = clock_ns();
    }
    return line->count < before;
}

static int open_device(const char *namespace) {
    char path[256];
    snprintf(path, sizeof path, "/run/netns/%s", namespace);
    int inside = open(path, O_RDONLY | O_CLOEXEC);
    if (inside < 0 || setns(inside, CLONE_NEWNET) < 0)
        fail(path);
    close(inside);
    int device = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    if (device < 0)
        fail("/dev/net/tun");
    struct ifreq request = {.ifr_name = "wan0", .ifr_flags = IFF_TUN | IFF_NO_PI};
    if (ioctl(device, TUNSETIFF, &request) < 0)
        fail("wan0");
    return device;
}

static void *memory_for(size_t size) {
    /* Not touched before it is used: most of it never is. */
    void *memory =
        mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED)
        fail("memory");
    return memory;
}

static void lay(struct line *line, const struct line_options *options, int from, int to,
                uint64_t seed) {
    double held = options->queue + options->rate * (double)options->delay / 8e9;
    *line = (struct line){.options = options, .from = from, .to = to, .random = seed};
    line->capacity = (uint32_t)(held / AVERAGE) + 8192;
    line->ring = memory_for(line->capacity * sizeof *line->ring);
    line->free_slots = memory_for(line->capacity * sizeof *line->free_slots);
    line->memory = memory_for((size_t)line->capacity * SLOT);
    for (uint32_t slot = 0; slot < line->capacity; slot++)
        line->free_slots[slot] = slot;
}

static void report(const char *name, const struct line *line) {
    uint64_t through = line->delivered + line->failed;
    printf("\"%s\": {\"packets\": %" PRIu64 ", \"bytes\": %" PRIu64 ", \"delivered\": %" PRIu64
           ", \"lost\": %" PRIu64 ", \"lost_in_bursts\": %" PRIu64 ", \"dropped\": %" PRIu64
           ", \"overrun\": %" PRIu64 ", \"failed\": %" PRIu64
           ", \"longest_queue\": %.0f, \"latest\": %.6f, \"late\": %.6f}",
           name, line->packets, line->bytes, line->delivered, line->lost, line->lost_in_bursts,
           line->dropped, line->overrun, line->failed, line->longest_queue,
           (double)line->latest / 1e9, through ? (double)line->late / (double)through / 1e9 : 0.0);
}

static void wait_for_work(const struct line lines[2], bool busy, const sigset_t *unblocked) {
    struct pollfd devices[2] = {{.fd = lines[0].from, .events = POLLIN},
                                {.fd = lines[1].from, .events = POLLIN}};
    uint64_t rest = UINT64_MAX, now = clock_ns();
    if (busy)
        rest = TURN_NS;
    for (int i = 0; !busy && i < 2; i++) {
        if (!lines[i].count)
            continue;
        uint64_t due = lines[i].ring[lines[i].first].due;
        uint64_t left = due > now ? due - now : 0;
        rest = left < rest ? left : rest;
    }
    struct timespec timeout = {(time_t)(rest / SECOND), (long)(rest % SECOND)};
    ppoll(devices, busy ? 0 : 2, rest == UINT64_MAX ? NULL : &timeout, unblocked);
}

static void run_before_others(void) {
    struct sched_param priority = {.sched_priority = 1};
    if (sched_setscheduler(0, SCHED_FIFO, &priority) < 0)
        perror("forwarder: no real-time priority, so that its delays are less exact");
    /* Timers may fire so many ns late; the default, 50 us, is as much as a whole turn. */
    prctl(PR_SET_TIMERSLACK, 1000UL);
}

static void obey_signals(sigset_t *unblocked) {
    sigset_t blocked;
    struct sigaction action = {.sa_handler = stop};
    sigemptyset(&blocked);
    sigaddset(&blocked, SIGTERM);
    sigaddset(&blocked, SIGINT);
    /* Blocked except in ppoll, or one that came just before it would be slept through. */
    sigprocmask(SIG_BLOCK, &blocked, unblocked);
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGINT, &action, NULL);
    prctl(PR_SET_PDEATHSIG, SIGTERM);
}

int main(int count, char **arguments) {
    const char *namespaces[2] = {NULL, NULL};
    struct line_options options = {.rate = 1e9, .queue = 65536, .burst_ends = 1};
    double burst_loss = 0, burst_length = 1;
    uint64_t seed = 1;
    for (int option; (option = getopt(count, arguments, "A:B:d:r:q:l:L:n:s:")) != -1;) {
        switch (option) {
        case 'A': namespaces[0] = optarg; break;
        case 'B': namespaces[1] = optarg; break;
        case 'd': options.delay = strtoull(optarg, NULL, 10); break;
        case 'r': options.rate = atof(optarg); break;
        case 'q': options.queue = atof(optarg); break;
        case 'l': options.loss = atof(optarg); break;
        case 'L': burst_loss = atof(optarg); break;
        case 'n': burst_length = atof(optarg); break;
        case 's': seed = strtoull(optarg, NULL, 10); break;
        default: return 2;
        }
    }
    if (!namespaces[0] || !namespaces[1] || options.rate <= 0 || burst_length < 1 ||
        burst_loss < 0 || burst_loss >= 1) {
        fputs("forwarder: give both namespaces, a rate, and losses that can be\n", stderr);
        return 2;
    }
    /* Of a share of all packets, in bursts of a mean length, the chance that one begins. */
    options.burst_begins = burst_loss / (burst_length * (1 - burst_loss));
    options.burst_ends = 1 / burst_length;

    sigset_t unblocked;
    obey_signals(&unblocked);
    int devices[2] = {open_device(namespaces[0]), open_device(namespaces[1])};
    struct line lines[2];
    lay(&lines[0], &options, devices[0], devices[1], seed);
    lay(&lines[1], &options, devices[1], devices[0], ~seed);
    run_before_others();
    puts("ready");
    fflush(stdout);

    while (!stopped) {
        uint64_t now = clock_ns();
        bool busy = take(&lines[0], now);
        busy |= take(&lines[1], clock_ns());
        busy |= deliver(&lines[0]);
        busy |= deliver(&lines[1]);
        wait_for_work(lines, busy, &unblocked);
    }
    putchar('{');
    report("up", &lines[0]);
    printf(", ");
    report("down", &lines[1]);
    puts("}");
    return 0;
}
