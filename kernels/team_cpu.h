// Work that a team of threads shares: phases one after the other, whose items go to whoever is free.
//
// A phase has ended when its items are done, not when all threads say so: nobody waits for one that has not come yet,
// and what several calls do is one plan, for which a team is woken once. Whoever waits does so for less than an item.

#pragma once
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>

#define MAX_PHASES 24
#define SMALL_WORK (1 << 16)  // multiplications, or numbers moved, that one thread does sooner than two
#define WAIT_LOOKS 500  // at a phase before a waiting thread lets another one have its core: some 10 microseconds

// Of libgomp, which torch has loaded. Its threads are used, for two teams would compete for the cores.
extern "C" void GOMP_parallel(void (*)(void *), void *, unsigned, unsigned) __attribute__((weak));

struct Memory {  // of a thread; it grows and stays
    char *data;
    int64_t size;
    char *get(int64_t wanted) {
        if (wanted > size) {
            free(data);
            size = (wanted + 16383) / 16384 * 16384;
            data = (char *)aligned_alloc(64, size);
            if (!data) size = 0;
        }
        return data;
    }
};

struct Phase {
    void (*work)(Phase &);  // takes items until there are none
    void *job;
    int64_t num_items;
    bool has_failed;
    alignas(64) int64_t next;
    alignas(64) int64_t done;

    template <class Take> void each(Take take) {
        for (;;) {
            const int64_t item = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
            if (item >= num_items) return;
            take(item);
            __atomic_fetch_add(&done, 1, __ATOMIC_RELEASE);
        }
    }

    void wait() const {
        for (int looks = 0; __atomic_load_n(&done, __ATOMIC_ACQUIRE) < num_items; looks++) {
            if (looks >= WAIT_LOOKS) sched_yield();
#if defined(__x86_64__)
            else __builtin_ia32_pause();
#endif
        }
    }
};

struct Plan {
    Phase phases[MAX_PHASES];
    int64_t num_phases, work_size, most_items, used, size;
    char *memory;

    void begin(const Memory &from) {
        num_phases = work_size = most_items = used = 0;
        memory = from.data, size = from.size;
    }

    // Return memory that is the plan's until it has run; null: there must be more.
    void *room(int64_t bytes) {
        char *const found = memory + used;
        used += (bytes + 63) / 64 * 64;
        return used <= size ? found : nullptr;
    }

    void add(void (*work)(Phase &), void *job, int64_t num_items, int64_t more_work) {
        phases[num_phases++] = {work, job, num_items, false, 0, 0};
        work_size += more_work;
        if (num_items > most_items) most_items = num_items;
    }

    // Return whether a phase has failed.
    bool run(int64_t num_threads) {
        if (work_size < SMALL_WORK) num_threads = 1;
        if (num_threads > most_items) num_threads = most_items;
        if (num_threads > 1 && GOMP_parallel) GOMP_parallel(work_through, this, num_threads, 0);
        else work_through(this);
        bool has_failed = false;
        for (int64_t i = 0; i < num_phases; i++) has_failed |= phases[i].has_failed;
        return has_failed;
    }

    static void work_through(void *pointer) {
        Plan &plan = *(Plan *)pointer;
        for (int64_t i = 0; i < plan.num_phases; i++) plan.phases[i].work(plan.phases[i]), plan.phases[i].wait();
    }
};

// Run what `add` adds to a plan. Return whether that was impossible.
template <class Add> static bool run_planned(int64_t num_threads, Add add) {
    static thread_local Memory memory;
    Plan plan;
    for (plan.begin(memory), add(plan); plan.used > plan.size; plan.begin(memory), add(plan))
        if (!memory.get(plan.used)) return true;
    return plan.run(num_threads);
}
