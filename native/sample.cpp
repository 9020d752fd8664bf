#include "sample.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu.h"
#include "export.h"
#include "threads.h"

namespace fledge {
namespace {

constexpr float BELOW_ALL = -std::numeric_limits<float>::infinity();
constexpr int64_t FEW = 32;  // scores that are sorted rather than looked through by groups

// Bans and penalties in, tokens that are not allowed out: how many scores there are.
int64_t lay_out(const Draw& wanted, int64_t vocabulary, Desk& desk) {
    float* scores = desk.scores;
    std::memcpy(scores, wanted.logits, static_cast<size_t>(vocabulary) * sizeof(float));
    for (int64_t i = 0; i < wanted.banned_count; i++) scores[wanted.banned[i]] = BELOW_ALL;
    for (int64_t i = 0; i < wanted.known_count; i++) {
        const auto penalty = static_cast<float>(wanted.presence + wanted.frequency * wanted.times[i]);
        if (penalty != 0) scores[wanted.known[i]] -= penalty;  // or a score too small for a normal float would become 0
    }
    int64_t count = vocabulary;
    if (wanted.allowed) {
        count = 0;
        for (int64_t i = 0; i < vocabulary; i++)
            if (wanted.allowed[i]) {
                scores[count] = scores[i];
                desk.ids[count++] = static_cast<int32_t>(i);
            }
    }
    const int64_t whole = round_up(count, SCORES);
    std::fill(scores + count, scores + whole, BELOW_ALL);
    return whole;
}

// Of a few scores the one with which the running sum of their weights, largest first, reaches the goal.
float last_of_few(float* scores, double* weights, int64_t count, double sum, double goal) {
    for (int64_t i = 1; i < count; i++)
        for (int64_t j = i; j && scores[j - 1] < scores[j]; j--)
            std::swap(scores[j - 1], scores[j]), std::swap(weights[j - 1], weights[j]);
    int64_t place = 0;
    for (; place + 1 < count && (sum += weights[place]) < goal;) place++;
    return scores[place];
}

// The score with which the running sum of the weights (null: ones), largest score first, reaches the goal; the lowest
// of the span, should it not. Whole groups of neighbours are summed, then the one where it happens is looked into.
float cutoff(const float* scores, const double* weights, int64_t n, float least, float most, double goal, Desk& desk) {
    // Most tokens have low scores: where the goal lies in the upper half of the span, they need no closer look.
    const auto middle = static_cast<float>(most - (static_cast<double>(most) - least) / 2);
    if (kernels().above(scores, weights, n, middle) >= goal) least = std::max(least, middle);
    double sum = 0;
    while (least < most) {
        const Span span{least, most, (GROUPS - 1) / (static_cast<double>(most) - least)};
        double* groups = desk.groups;
        std::fill(groups, groups + GROUPS + LANES, 0.0);
        kernels().spread(scores, weights, n, span, groups);
        int32_t reached = 0;  // the last group that is not empty, where the goal lies beyond all
        double before = sum;
        for (int32_t group = 0; group < GROUPS; group++) {
            if (groups[group] == 0) continue;
            reached = group, before = sum;
            if ((sum += groups[group]) >= goal) break;
        }
        sum = before;
        const int64_t count = kernels().gather(scores, weights, n, span, reached, desk.few, desk.shares);
        if (count <= FEW) return last_of_few(desk.few, desk.shares, count, sum, goal);
        n = round_up(count, SCORES);
        std::fill(desk.few + count, desk.few + n, BELOW_ALL);
        scores = desk.few, weights = desk.shares;
        const Extremes found = kernels().extremes(scores, n);
        least = found.lowest, most = found.highest;
    }
    return most;
}

// The lowest score that stays of those whose weights add up to `total`.
float top_p(const Draw& wanted, int64_t n, const Extremes& found, double total, Desk& desk) {
    const double highest = found.highest;
    float least = static_cast<float>(highest - FARTHEST);
    if (highest - least > FARTHEST) least = std::nextafter(least, found.highest);
    least = std::max(least, found.lowest);
    if (wanted.top_p == 1.0) return least;
    // Tokens below this bound hold less than half of 1 - top_p even all together, so the sum is reached before them.
    const double bound = std::log((1.0 - wanted.top_p) * total / (2.0 * static_cast<double>(n)));
    least = std::max(least, static_cast<float>(highest + std::min(bound, 0.0)));
    return cutoff(desk.scores, desk.weights, n, least, found.highest, wanted.top_p * total, desk);
}

// The lowest score of the `count` highest ones. Of those that equal it, the last ones that are too many are taken out.
float top_k(int64_t count, int64_t n, float least, float most, Desk& desk) {
    least = cutoff(desk.scores, nullptr, n, least, most, static_cast<double>(count), desk);
    for (int64_t i = 0; i < n; i++) count -= desk.scores[i] >= least;
    for (int64_t i = n - 1; i >= 0 && count < 0; i--)
        if (desk.scores[i] == least) desk.scores[i] = BELOW_ALL, count++;
    return least;
}

// The place of the weight with which their running sum exceeds `number` times the whole.
int64_t chosen(double number, int64_t n, const Desk& desk) {
    double whole = 0, before = 0;
    int64_t block = 0, last = 0;
    for (int64_t i = 0; i < n / SCORES; i++) whole += desk.sums[i];
    const double place = number * whole;
    for (int64_t i = 0; i < n / SCORES; i++) {
        if (desk.sums[i] == 0) continue;
        block = i;
        if (before + desk.sums[i] > place) break;
        before += desk.sums[i];
    }
    for (int64_t i = block * SCORES; i < (block + 1) * SCORES; i++) {
        if (desk.weights[i] == 0) continue;
        last = i;
        if ((before += desk.weights[i]) > place) break;
    }
    return last;
}

}  // namespace

void Desk::reset(int64_t vocabulary) {
    const int64_t room = round_up(vocabulary, SCORES);
    const int64_t doubles = 2 * room + room / SCORES + GROUPS + LANES;
    weights = static_cast<double*>(
        memory_.bytes(static_cast<size_t>(doubles) * sizeof(double) + static_cast<size_t>(3 * room) * sizeof(float)));
    shares = weights + room, sums = shares + room, groups = sums + room / SCORES;
    scores = reinterpret_cast<float*>(groups + GROUPS + LANES);
    few = scores + room;
    ids = reinterpret_cast<int32_t*>(few + room);
}

int64_t draw(const Draw& wanted, int64_t vocabulary, Desk& desk) {
    for (int64_t i = 0; i < wanted.banned_count; i++)
        if (wanted.banned[i] >= vocabulary) return BEYOND;
    const int64_t n = lay_out(wanted, vocabulary, desk);
    const Extremes found = n ? kernels().extremes(desk.scores, n) : Extremes{BELOW_ALL, BELOW_ALL, false};
    if (found.nan) return NOT_NUMBERS;
    if (found.highest == BELOW_ALL) return NOTHING;
    if (found.highest == -BELOW_ALL) return INFINITE;
    int64_t place = 0;
    if (wanted.temperature == 0.0) {
        while (desk.scores[place] != found.highest) place++;
    } else {
        const double total = kernels().weigh(desk.scores, n, found.highest, desk.weights);
        Heat heat{top_p(wanted, n, found, total, desk), found.highest, wanted.temperature};
        if (wanted.top_k) heat.least = top_k(wanted.top_k, n, heat.least, heat.highest, desk);
        kernels().heat(desk.scores, n, heat, desk.weights, desk.sums);
        place = chosen(wanted.number, n, desk);
    }
    return wanted.allowed ? desk.ids[place] : place;
}

}  // namespace fledge

using namespace fledge;

// A token for each row: its id, or a Refusal. 0, or -1 where memory did not suffice.
FLEDGE_API int fledge_sample(const Draw* draws, int64_t rows, int64_t vocabulary, int64_t* found) {
    // Kept between calls, and never destroyed: fresh memory of this size would take longer than a draw.
    static std::vector<Desk*>& desks = *new std::vector<Desk*>;
    return guarded([&] {
        Turn turn;
        const auto count = static_cast<size_t>(rows == 1 ? 1 : threads());
        while (desks.size() < count) desks.push_back(new Desk);
        for (size_t i = 0; i < count; i++) desks[i]->reset(vocabulary);
        parallel(rows, rows * vocabulary * static_cast<int64_t>(sizeof(double)), [&](int64_t row, int thread) {
            found[row] = draw(draws[row], vocabulary, *desks[static_cast<size_t>(thread)]);
        });
    });
}
