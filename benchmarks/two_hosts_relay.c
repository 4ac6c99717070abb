/* A link with a delay and a rate between two network namespaces, for kernels without netem: two_hosts.sh starts it.
 *
 *   relay LINK NAMESPACE_FILE DELAY_US RATE_MBIT     (rate 0: unlimited)
 *
 * It opens a TUN device named LINK in its own namespace and one in the other, and passes every packet on when it is due:
 * after those before it have left at the given rate, and the delay after that. A full queue is no longer read, so that
 * the device drops. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

enum { SLOTS = 4096, LARGEST = 9216 };

struct packet {
  long long due; /* nanoseconds */
  ssize_t length;
  char bytes[LARGEST];
};

struct way {
  int from, to;
  long long busy_until;
  unsigned first, count;
  struct packet *queue;
};

static long long now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void check(int good, const char *what) {
  if (!good) {
    perror(what);
    exit(1);
  }
}

static int open_tun(const char *name) {
  struct ifreq request = {.ifr_flags = IFF_TUN | IFF_NO_PI};
  int file = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
  check(file >= 0, "/dev/net/tun");
  strncpy(request.ifr_name, name, IFNAMSIZ - 1);
  check(ioctl(file, TUNSETIFF, &request) == 0, name);
  return file;
}

static void take(struct way *w, long long delay, double ns_per_byte) {
  while (w->count < SLOTS) {
    struct packet *p = &w->queue[(w->first + w->count) % SLOTS];
    p->length = read(w->from, p->bytes, LARGEST);
    if (p->length <= 0) return;
    long long t = now();
    if (w->busy_until < t) w->busy_until = t;
    w->busy_until += (long long)(p->length * ns_per_byte);
    p->due = w->busy_until + delay;
    w->count++;
  }
}

static void deliver(struct way *w) {
  while (w->count && w->queue[w->first].due <= now()) {
    struct packet *p = &w->queue[w->first];
    if (write(w->to, p->bytes, p->length) < 0) { /* the link is down: the packet is lost */
    }
    w->first = (w->first + 1) % SLOTS;
    w->count--;
  }
}

int main(int count, char **arguments) {
  if (count != 5) return 2;
  int here = open_tun(arguments[1]);
  int other = open(arguments[2], O_RDONLY | O_CLOEXEC), own = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
  check(other >= 0 && setns(other, CLONE_NEWNET) == 0, arguments[2]);
  int there = open_tun(arguments[1]);
  check(setns(own, CLONE_NEWNET) == 0, "setns");
  long long delay = atoll(arguments[3]) * 1000;
  double rate = atof(arguments[4]), ns_per_byte = rate > 0 ? 8e3 / rate : 0;
  prctl(PR_SET_TIMERSLACK, 1);

  struct way ways[2] = {{.from = here, .to = there}, {.from = there, .to = here}};
  for (int i = 0; i < 2; i++) check((ways[i].queue = calloc(SLOTS, sizeof(struct packet))) != NULL, "memory");
  for (;;) {
    struct pollfd files[2];
    long long next = now() + 1000000000LL;
    for (int i = 0; i < 2; i++) {
      struct way *w = &ways[i];
      files[i] = (struct pollfd){.fd = w->from, .events = w->count < SLOTS ? POLLIN : 0};
      if (w->count && w->queue[w->first].due < next) next = w->queue[w->first].due;
    }
    long long rest = next - now();
    struct timespec wait = {rest > 0 ? rest / 1000000000LL : 0, rest > 0 ? rest % 1000000000LL : 0};
    ppoll(files, 2, &wait, NULL);
    for (int i = 0; i < 2; i++) {
      if (files[i].revents & (POLLERR | POLLNVAL)) return 0; /* the hosts are gone */
      if (files[i].revents & POLLIN) take(&ways[i], delay, ns_per_byte);
      deliver(&ways[i]);
    }
  }
}
