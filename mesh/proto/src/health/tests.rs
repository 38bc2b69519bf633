//! Budgets and trust.

use super::*;

const MS: Duration = Duration::from_millis(1);

/// When a call is given up.
fn total(trust: &Trust, assignments: u32, speed: &Speed) -> Duration {
    trust.budget(assignments, speed).total
}

fn answered(trust: &mut Trust, assignments: u32, round_trip: Duration, times: usize) {
    (0..times).for_each(|_| trust.answered(assignments, round_trip / 2, round_trip));
}

#[test]
fn budgets_follow_the_calls_of_the_same_size() {
    let mut trust = Trust::default();
    let speed = Speed::default();
    assert_eq!(total(&trust, 8, &speed), BUDGET_BEFORE_HISTORY);
    answered(&mut trust, 8, 2 * MS, 1);
    assert_eq!(total(&trust, 8, &speed), BUDGET_FLOOR);
    assert_eq!(total(&trust, 1, &speed), BUDGET_FLOOR, "a smaller call needs no longer");
    assert_eq!(total(&trust, 64, &speed), BUDGET_FLOOR, "2 ms x 8 x 4 is below the floor");
    assert_eq!(total(&trust, 256, &speed), 2 * MS * 32 * 4);
    answered(&mut trust, 256, 40 * MS, 1);
    assert_eq!(total(&trust, 256, &speed), 40 * MS * 4, "seen, so not guessed");
    // A change of speed is followed: after 40 calls less than a hundredth of the old mean is left.
    answered(&mut trust, 256, 80 * MS, 40);
    let budget = total(&trust, 256, &speed);
    assert!(budget > 315 * MS && budget < 320 * MS, "{budget:?}");
}

#[test]
fn a_slow_node_is_given_the_time_it_needs() {
    let mut trust = Trust::default();
    answered(&mut trust, 8, 150 * MS, 1);
    assert_eq!(total(&trust, 8, &Speed::default()), 600 * MS);
    answered(&mut trust, 512, 4000 * MS, 1);
    assert_eq!(total(&trust, 512, &Speed::default()), 6000 * MS, "above the ceiling, as expected of it");
    assert_eq!(total(&trust, 64, &Speed::default()), GUESS_MAX.min(150 * 8 * MS) * 3 / 2);
    assert_eq!(total(&trust, u32::MAX, &Speed::default()), 6000 * MS, "no less than half as much took");
    let mut trust = Trust::default();
    answered(&mut trust, 8, 150 * MS, 1);
    assert_eq!(total(&trust, u32::MAX, &Speed::default()), GUESS_MAX * 3 / 2, "a guess has an end");
}

#[test]
fn before_history_the_measured_bandwidth_counts() {
    let trust = Trust::default();
    // Experts of 100 MB at 100 MB/s: a second each at one row, and 4 rows cost as much as one.
    let speed = Speed {
        weight_mb_s: [100, 100, 50, 50, 50],
        expert_bytes: 100_000_000,
        per_layer: 4,
        ..Speed::default()
    };
    assert_eq!(total(&trust, 1, &speed), 1500 * MS);
    assert_eq!(total(&trust, 4, &speed), 6000 * MS);
    assert_eq!(total(&trust, 16, &speed), 6000 * MS);
    assert_eq!(total(&trust, 64, &speed), 12000 * MS);
    assert_eq!(total(&trust, 4 * 512, &speed), 24000 * MS, "beyond the measured rows time grows with them");
    let partly = Speed { weight_mb_s: [100, 100, 0, 0, 0], ..speed };
    assert_eq!(total(&trust, 64, &partly), 24000 * MS, "16 rows as 4 times 4");
    let absurd =
        Speed { weight_mb_s: [1; 5], expert_bytes: u64::MAX, per_layer: u32::MAX, ..Speed::default() };
    assert_eq!(total(&trust, u32::MAX, &absurd), BUDGET_MAX);
    let mut trust = trust;
    trust.missed(Duration::ZERO);
    trust.missed(Duration::ZERO);
    assert_eq!(total(&trust, u32::MAX, &absurd), BUDGET_MAX, "patience included");
}

#[test]
fn two_misses_in_a_row_suspend_and_the_pause_doubles() {
    let mut trust = Trust::default();
    assert!(!trust.missed(Duration::ZERO));
    trust.answered(1, MS, MS);
    assert!(!trust.missed(Duration::ZERO), "an answer in between resets");
    assert!(trust.missed(Duration::ZERO));
    assert!(trust.is_suspect());
    assert!(!trust.missed(Duration::ZERO), "calls that were out do not count again");

    let mut now = Duration::ZERO;
    let mut pause = PAUSE_FIRST;
    for _ in 0..40 {
        assert!(!trust.tick(now + pause - MS));
        assert!(trust.tick(now + pause));
        assert!(!trust.is_suspect());
        now += pause;
        assert!(trust.missed(now), "one miss ends a trial");
        pause = (pause * 2).min(PAUSE_MAX);
    }
    assert!(total(&trust, 1, &Speed::default()) == BUDGET_FLOOR * PATIENCE_MAX, "patience has an end");

    assert!(trust.tick(now + pause));
    trust.answered(1, MS, MS);
    assert_eq!(total(&trust, 1, &Speed::default()), BUDGET_FLOOR);
    assert!(!trust.missed(now), "trusted again, in full");
    assert!(trust.missed(now));
    assert!(trust.tick(now + PAUSE_FIRST), "and the pause is the first again");
}

#[test]
fn late_answers_teach_but_do_not_end_the_pause() {
    let mut trust = Trust::default();
    trust.missed(Duration::ZERO);
    trust.missed(Duration::ZERO);
    answered(&mut trust, 8, 300 * MS, 1);
    assert!(trust.is_suspect());
    trust.tick(PAUSE_FIRST);
    assert_eq!(total(&trust, 8, &Speed::default()), BUDGET_CEILING * 2);
    assert_eq!(trust.means(), Some((150 * MS, 300 * MS)));
}

/// F2: the calls that make a killed node suspect end within the promise, with half a second for the router's work.
#[test]
fn misses_until_suspicion_fit_the_promised_stall() {
    assert!(BUDGET_CEILING * MISSES_MAX <= Duration::from_millis(1500));
    assert!(BUDGET_BEFORE_HISTORY <= BUDGET_CEILING && BUDGET_FLOOR <= BUDGET_BEFORE_HISTORY);
}

#[test]
fn a_call_is_late_long_before_it_is_given_up_but_not_at_once() {
    let mut trust = Trust::default();
    let speed = Speed { round_trip: 30 * MS, ..Speed::default() };
    let before = trust.budget(8, &speed);
    assert_eq!(before, Budget { hedge: HEDGE_BEFORE_HISTORY, total: BUDGET_BEFORE_HISTORY });
    // 4 experts of 5 MB at 100 MB/s, and the link.
    let measured = Speed { weight_mb_s: [100; 5], expert_bytes: 5_000_000, per_layer: 4, ..speed };
    assert_eq!(trust.budget(4, &measured).hedge, 200 * 2 * MS + speed.round_trip);
    answered(&mut trust, 8, 2 * MS, 1);
    assert_eq!(trust.budget(8, &speed), Budget { hedge: HEDGE_FLOOR, total: BUDGET_FLOOR });
    answered(&mut trust, 64, 40 * MS, 1);
    assert_eq!(
        trust.budget(64, &speed),
        Budget { hedge: 80 * MS, total: 160 * MS },
        "the link is part of it"
    );
    answered(&mut trust, 512, 60_000 * MS, 1);
    let endless = trust.budget(512, &speed);
    assert_eq!(endless, Budget { hedge: BUDGET_MAX, total: BUDGET_MAX }, "never after it is given up");
}

#[test]
fn doubts_end_with_an_answer_or_after_a_while() {
    let mut doubts = Doubts::default();
    assert!(!doubts.any(MS) && !doubts.of(3, MS));
    doubts.overdue(3, MS);
    doubts.overdue(1, MS);
    assert!(doubts.any(MS) && doubts.of(3, MS) && doubts.of(1, MS) && !doubts.of(2, MS));
    doubts.answered(3);
    doubts.answered(9);
    assert!(!doubts.of(3, MS) && doubts.of(1, MS));
    assert!(doubts.of(1, DOUBT_MAX));
    assert!(!doubts.of(1, DOUBT_MAX + MS) && !doubts.any(DOUBT_MAX + MS));
}

#[test]
fn three_losses_in_a_minute_bar_a_node_for_longer_each_time() {
    let second = 1000 * MS;
    let mut flaps = Flaps::default();
    assert_eq!((flaps.lost(second), flaps.lost(31 * second)), (None, None));
    assert_eq!(flaps.lost(61 * second), Some(PAUSE_FIRST));
    assert!(flaps.is_barred(62 * second - MS) && !flaps.is_barred(62 * second));
    let mut now = 61 * second;
    for pause in [2, 4, 8, 16, 30, 30] {
        now += 2 * second;
        assert_eq!(flaps.lost(now), Some(pause * second));
        assert!(flaps.is_barred(now + (pause - 1) * second));
    }
    now += FLAP_WITHIN;
    assert_eq!(flaps.lost(now), Some(PAUSE_MAX), "not forgiven yet");
    now += FLAP_WITHIN + MS;
    assert_eq!(flaps.lost(now), None);
    assert_eq!(flaps.lost(now + FLAP_WITHIN / 2), None);
    assert_eq!(flaps.lost(now + FLAP_WITHIN + MS), None, "the first is no longer one of the last minute");
}
