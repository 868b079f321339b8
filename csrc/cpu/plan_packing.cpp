#include "cpu/plan_packing.h"

#include <algorithm>
#include <map>
#include <numeric>
#include <vector>

namespace granvit {

int64_t plan_packing(const int64_t* lengths, int64_t count, int64_t capacity, int64_t* indices, int64_t* ends) {
    if (count == 0) return 0;
    std::vector<int64_t> order(count);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
    const int64_t shortest = lengths[order.back()];

    // The lists that have a certain room are a stack, linked through `below`; `tops` has the stacks by room.
    std::map<int64_t, int64_t> tops;
    std::vector<int64_t> below, sizes, list_of(count);
    for (int64_t i = 0; i < count; ++i) {
        const int64_t length = lengths[order[i]];
        int64_t list, room;
        decltype(tops)::node_type emptied;
        const auto fit = tops.lower_bound(length);
        if (fit == tops.end()) {
            list = int64_t(sizes.size());
            room = capacity;
            below.push_back(-1);
            sizes.push_back(0);
        } else {
            list = fit->second;
            room = fit->first;
            if (below[list] < 0) emptied = tops.extract(fit);
            else fit->second = below[list];
        }
        list_of[i] = list;
        ++sizes[list];
        room -= length;
        if (room < shortest) continue;  // nothing fits into it any more
        const auto same = tops.lower_bound(room);
        if (same != tops.end() && same->first == room) {
            below[list] = same->second;
            same->second = list;
        } else {
            below[list] = -1;
            if (emptied) {  // a node to use again
                emptied.key() = room;
                emptied.mapped() = list;
                tops.insert(same, std::move(emptied));
            } else {
                tops.emplace_hint(same, room, list);
            }
        }
    }

    const int64_t lists = int64_t(sizes.size());
    std::partial_sum(sizes.begin(), sizes.end(), ends);
    std::vector<int64_t> next(lists, 0);
    std::copy(ends, ends + lists - 1, next.begin() + 1);
    for (int64_t i = 0; i < count; ++i) indices[next[list_of[i]]++] = order[i];
    return lists;
}

}  // namespace granvit
