//! Every rule of the life of a call, and random lives in which nothing is lost and nothing counts twice.

use proptest::prelude::*;

use super::*;

const MS: Duration = Duration::from_millis(1);
const BUDGET: Budget = Budget { hedge: Duration::from_millis(20), total: Duration::from_millis(100) };

fn good(_: NodeIndex) -> Standing {
    Standing::Good(0)
}

fn held_by(nodes: &[NodeIndex]) -> Holders {
    nodes.iter().copied().collect()
}

/// Attempts with one call to node 0 of a unit per list of holders, sent at time zero.
fn one_call(holders: &[&[NodeIndex]], fallback: bool) -> (Attempts, HedgeBudget) {
    let mut attempts = Attempts::default();
    attempts.clear(fallback);
    let units: Vec<Unit> = holders.iter().map(|nodes| attempts.unit(held_by(nodes), 1)).collect();
    assert_eq!(attempts.ask(0, &units, Duration::ZERO, BUDGET), 0);
    (attempts, HedgeBudget::default())
}

/// What is to be done at `now`, up to the next wait; calls that are sent are said to have started.
fn steps(attempts: &mut Attempts, now: Duration, hedges: &mut HedgeBudget) -> Vec<Step> {
    steps_with(attempts, now, hedges, &good)
}

fn steps_with(
    attempts: &mut Attempts,
    now: Duration,
    hedges: &mut HedgeBudget,
    standing: &dyn Fn(NodeIndex) -> Standing,
) -> Vec<Step> {
    let mut steps = Vec::new();
    loop {
        let step = attempts.next(now, standing, hedges);
        steps.push(step);
        match step {
            Step::Send { call, .. } => attempts.started(call, now, BUDGET),
            Step::Wait(_) | Step::Done => return steps,
            _ => {}
        }
    }
}

/// The calls sent among `steps`: to whom, for what, and whether as a hedge.
fn sent(attempts: &Attempts, steps: &[Step]) -> Vec<(NodeIndex, Vec<Unit>, bool)> {
    let of = |step: &Step| match step {
        Step::Send { node, units, hedge, .. } => Some((*node, attempts.list(*units).to_vec(), *hedge)),
        _ => None,
    };
    steps.iter().filter_map(of).collect()
}

fn computed(attempts: &Attempts, steps: &[Step]) -> Vec<(Vec<Unit>, bool)> {
    let of = |step: &Step| match step {
        Step::Compute { units, mapped } => Some((attempts.list(*units).to_vec(), *mapped)),
        _ => None,
    };
    steps.iter().filter_map(of).collect()
}

#[test]
fn an_answer_in_time_is_added_and_that_is_all() {
    let (mut attempts, mut hedges) = one_call(&[&[0, 1], &[0, 2]], true);
    assert_eq!(steps(&mut attempts, MS, &mut hedges), [Step::Wait(BUDGET.hedge)]);
    assert!(attempts.answered(0));
    assert_eq!(steps(&mut attempts, 2 * MS, &mut hedges), [Step::Add(0), Step::Done]);
    assert!(!attempts.answered(0), "a second time");
    assert!(!attempts.answered(7), "what nobody asked for");
    assert_eq!(steps(&mut attempts, 2 * MS, &mut hedges), [Step::Done]);
    assert_eq!(attempts.counts(), Counts { ignored: 2, ..Counts::default() });
}

#[test]
fn a_late_call_is_hedged_at_the_other_holders_and_whichever_side_is_complete_first_wins() {
    for (order, winner) in [([0, 1, 2], 0), ([1, 0, 2], 0), ([1, 2, 0], 1)] {
        let (mut attempts, mut hedges) = one_call(&[&[0, 1], &[0, 2], &[0, 1]], true);
        let now = BUDGET.hedge;
        let at_hedge = steps(&mut attempts, now, &mut hedges);
        assert_eq!(at_hedge[0], Step::Overdue(0, 0));
        assert_eq!(sent(&attempts, &at_hedge), [(1, vec![0, 2], true), (2, vec![1], true)]);
        let mut all = Vec::new();
        for call in order {
            attempts.answered(call);
            all.extend(steps(&mut attempts, now + MS, &mut hedges));
        }
        all.retain(|step| !matches!(step, Step::Wait(_) | Step::Done));
        let expected = match winner {
            0 => vec![Step::Add(0), Step::Drop(1, Why::Spare), Step::Drop(2, Why::Spare)],
            _ => vec![Step::Add(1), Step::Add(2), Step::Drop(0, Why::Beaten)],
        };
        assert_eq!(all, expected, "{order:?}");
        assert_eq!(attempts.counts().hedges, 2);
        assert_eq!(attempts.counts().hedges_won, winner);
    }
}

#[test]
fn a_call_is_not_hedged_where_one_of_its_units_has_no_other_holder_that_is_well() {
    for (holders, bad) in
        [(&[0, 1][..], Standing::Doubtful(0)), (&[0, 1], Standing::Out), (&[0], Standing::Good(0))]
    {
        let (mut attempts, mut hedges) = one_call(&[&[0, 2], holders], true);
        let standing = |node| if node == 1 { bad } else { Standing::Good(0) };
        let at_hedge = steps_with(&mut attempts, BUDGET.hedge, &mut hedges, &standing);
        assert_eq!(at_hedge, [Step::Overdue(0, 0), Step::Wait(BUDGET.total)]);
    }
}

#[test]
fn a_failure_is_retried_at_once_at_the_least_loaded_holder_that_is_well() {
    let (mut attempts, mut hedges) = one_call(&[&[0, 1, 2, 3], &[0, 1, 2, 3], &[3, 0, 1]], true);
    attempts.failed(0);
    let standing = |node| match node {
        1 => Standing::Doubtful(0),
        2 => Standing::Good(5),
        3 => Standing::Good(4),
        _ => Standing::Good(0),
    };
    let after = steps_with(&mut attempts, MS, &mut hedges, &standing);
    // The first goes to 3, which is then as loaded as 2, which comes first.
    assert_eq!(sent(&attempts, &after), [(2, vec![1], false), (3, vec![0, 2], false)]);
    assert_eq!(attempts.counts().retries, 2);
    // 1 is doubtful: asked only where nobody else is left, and before the router.
    attempts.failed(2);
    let after = steps_with(&mut attempts, MS, &mut hedges, &standing);
    assert_eq!(sent(&attempts, &after), [(1, vec![2], false), (2, vec![0], false)]);
}

#[test]
fn the_router_computes_what_nobody_is_left_for_or_it_is_lost() {
    let standing = |node| if node == 0 { Standing::Out } else { Standing::Good(0) };
    for fallback in [true, false] {
        let (mut attempts, mut hedges) = one_call(&[&[0], &[0, 1]], fallback);
        attempts.failed(0);
        let after = steps_with(&mut attempts, MS, &mut hedges, &standing);
        assert_eq!(sent(&attempts, &after), [(1, vec![1], false)]);
        match (fallback, after[0]) {
            (true, Step::Compute { units, mapped: true }) | (false, Step::Lost(units)) => {
                assert_eq!(attempts.list(units), [0]);
            }
            other => panic!("{other:?}"),
        }
        assert!(attempts.answered(1));
        assert_eq!(steps(&mut attempts, MS, &mut hedges), [Step::Add(1), Step::Done]);
    }
}

#[test]
fn without_the_router_holders_are_asked_again_while_they_can_be_but_not_for_ever() {
    let to = |attempts: &Attempts, steps: &[Step]| {
        sent(attempts, steps).into_iter().map(|(node, units, _)| (node, units)).collect::<Vec<_>>()
    };
    // One late answer of the only holder does not end the request.
    let (mut attempts, mut hedges) = one_call(&[&[0]], false);
    steps(&mut attempts, BUDGET.hedge, &mut hedges);
    let after = steps(&mut attempts, BUDGET.total, &mut hedges);
    assert_eq!(to(&attempts, &after), [(0, vec![0])]);
    assert!(!attempts.answered(0), "its first answer came too late");
    assert!(attempts.answered(1));
    assert_eq!(steps(&mut attempts, BUDGET.total, &mut hedges), [Step::Add(1), Step::Done]);
    // Nodes that refuse at once are asked in turns, so often and no more.
    let (mut attempts, mut hedges) = one_call(&[&[0, 1]], false);
    let mut asked = vec![0];
    for call in 0..Call::from(ASKS_MAX) - 1 {
        attempts.failed(call);
        let after = steps(&mut attempts, MS, &mut hedges);
        asked.extend(to(&attempts, &after).iter().map(|(node, _)| *node));
    }
    assert_eq!(asked, [0, 1, 0, 1]);
    attempts.failed(Call::from(ASKS_MAX) - 1);
    assert!(matches!(steps(&mut attempts, MS, &mut hedges)[..], [Step::Lost(_), Step::Done]));
    // Where the router may compute, it does, once everybody was asked once.
    let (mut attempts, mut hedges) = one_call(&[&[0]], true);
    attempts.failed(0);
    let after = steps(&mut attempts, MS, &mut hedges);
    assert_eq!(computed(&attempts, &after), [(vec![0], true)]);
}

#[test]
fn a_call_that_is_not_answered_is_given_up_and_its_late_answer_ignored() {
    let (mut attempts, mut hedges) = one_call(&[&[0]], true);
    steps(&mut attempts, BUDGET.hedge, &mut hedges);
    let after = steps(&mut attempts, BUDGET.total, &mut hedges);
    assert_eq!(after[0], Step::Drop(0, Why::GaveUp));
    assert_eq!(computed(&attempts, &after), [(vec![0], true)]);
    assert!(!attempts.answered(0));
    assert_eq!(steps(&mut attempts, BUDGET.total, &mut hedges), [Step::Done]);
}

#[test]
fn rivals_stand_for_themselves_when_the_call_fails() {
    let (mut attempts, mut hedges) = one_call(&[&[0, 1], &[0, 2], &[0, 3, 4]], true);
    steps(&mut attempts, BUDGET.hedge, &mut hedges);
    assert!(attempts.answered(1));
    attempts.failed(3);
    assert!(matches!(steps(&mut attempts, BUDGET.hedge, &mut hedges)[..], [Step::Wait(_)]), "both kept back");
    attempts.failed(0);
    let after = steps(&mut attempts, BUDGET.hedge, &mut hedges);
    assert!(after.contains(&Step::Add(1)));
    assert_eq!(sent(&attempts, &after), [(4, vec![2], false)], "only what nobody works on");
    assert!(attempts.answered(2) && attempts.answered(4));
    assert_eq!(steps(&mut attempts, BUDGET.hedge, &mut hedges), [Step::Add(2), Step::Add(4), Step::Done]);
}

#[test]
fn the_router_as_a_holder_computes_its_part_of_a_hedge_once_the_others_are_there() {
    let (mut attempts, mut hedges) = one_call(&[&[0, ROUTER], &[0, 1]], true);
    let at_hedge = steps(&mut attempts, BUDGET.hedge, &mut hedges);
    assert_eq!(
        (sent(&attempts, &at_hedge), computed(&attempts, &at_hedge)),
        (vec![(1, vec![1], true)], vec![])
    );
    assert!(attempts.answered(1));
    let after = steps(&mut attempts, BUDGET.hedge, &mut hedges);
    assert_eq!(computed(&attempts, &after), [(vec![0], false)]);
    assert_eq!((after[0], after.last()), (Step::Add(1), Some(&Step::Done)));

    let (mut attempts, mut hedges) = one_call(&[&[0, ROUTER]], false);
    let at_hedge = steps(&mut attempts, BUDGET.hedge, &mut hedges);
    assert_eq!(computed(&attempts, &at_hedge), [(vec![0], false)], "alone, and at once");
    assert!(at_hedge.contains(&Step::Drop(0, Why::Beaten)));
    assert_eq!(at_hedge.last(), Some(&Step::Done));
}

#[test]
fn work_is_hedged_once_only() {
    let (mut attempts, mut hedges) = one_call(&[&[0, 1, 2, 3]], true);
    steps(&mut attempts, BUDGET.hedge, &mut hedges);
    attempts.failed(0);
    attempts.failed(1);
    let after = steps(&mut attempts, BUDGET.hedge, &mut hedges);
    assert_eq!(sent(&attempts, &after), [(2, vec![0], false)]);
    let late = steps(&mut attempts, 2 * BUDGET.hedge, &mut hedges);
    assert_eq!(late, [Step::Overdue(2, 2), Step::Wait(BUDGET.hedge + BUDGET.total)]);
    assert_eq!(attempts.counts().hedges, 1);
}

#[test]
fn hedges_are_five_percent_of_calls_and_a_burst() {
    let mut hedges = HedgeBudget::default();
    let mut sent_hedges = 0;
    let mut late_call = |hedges: &mut HedgeBudget| {
        let (mut attempts, _) = one_call(&[&[0, 1]], true);
        hedges.earn();
        let all = steps(&mut attempts, BUDGET.hedge, hedges);
        sent_hedges += sent(&attempts, &all).len() as u32;
        sent_hedges
    };
    (0..HEDGE_BURST).for_each(|_| assert!(late_call(&mut hedges) > 0));
    assert_eq!(late_call(&mut hedges), HEDGE_BURST, "the burst is used up");
    let after = (0..200 * CALLS_PER_HEDGE).map(|_| late_call(&mut hedges)).last().unwrap();
    assert!((HEDGE_BURST + 200..=HEDGE_BURST + 202).contains(&after), "{after}");
}

#[test]
fn a_call_that_cannot_be_sent_is_as_good_as_failed() {
    let (mut attempts, mut hedges) = one_call(&[&[0, 1]], true);
    attempts.failed(0);
    match attempts.next(MS, &good, &mut hedges) {
        Step::Send { call: 1, node: 1, .. } => attempts.failed(1),
        other => panic!("{other:?}"),
    }
    let after = steps(&mut attempts, MS, &mut hedges);
    assert_eq!(computed(&attempts, &after), [(vec![0], true)]);
    assert_eq!(after.last(), Some(&Step::Done));
}

/// What happens to a call, in the random lives below.
#[derive(Clone, Copy, Debug)]
enum Fate {
    Answer(u64),
    Fail(u64),
    Silence,
    /// Answered twice, the second time later.
    Twice(u64, u64),
    /// It cannot be sent.
    Unsendable,
}

fn fate() -> impl Strategy<Value = Fate> {
    prop_oneof![
        3 => (0..150_u64).prop_map(Fate::Answer),
        2 => (0..150_u64).prop_map(Fate::Fail),
        1 => Just(Fate::Silence),
        1 => (0..50_u64, 0..150_u64).prop_map(|(first, more)| Fate::Twice(first, first + more)),
        1 => Just(Fate::Unsendable),
    ]
}

#[derive(Debug)]
struct Life {
    /// By unit: holders. The first is asked first.
    units: Vec<Vec<NodeIndex>>,
    fates: Vec<Fate>,
    standings: Vec<u8>,
    fallback: bool,
}

fn life() -> impl Strategy<Value = Life> {
    let holder = prop_oneof![8 => 0..5_u16, 1 => Just(ROUTER)];
    let units = prop::collection::vec(prop::collection::vec(holder, 1..5), 1..8);
    let fates = prop::collection::vec(fate(), 40);
    (units, fates, prop::collection::vec(0..8_u8, 6), any::<bool>())
        .prop_map(|(units, fates, standings, fallback)| Life { units, fates, standings, fallback })
}

/// When something happens to which call, and whether it is an answer.
type Happening = (Duration, Call, bool);

impl Life {
    fn standing(&self, node: NodeIndex) -> Standing {
        match self.standings[usize::from(node).min(5)] {
            0 => Standing::Out,
            1 => Standing::Doubtful(u32::from(node)),
            load => Standing::Good(u32::from(load)),
        }
    }

    /// What will happen to a call that is sent now. False if it cannot be sent.
    fn send(&self, events: &mut Vec<Happening>, call: Call, now: Duration) -> bool {
        let at = |ms: u64| now + MS * ms as u32;
        match self.fates[call as usize % self.fates.len()] {
            Fate::Answer(ms) => events.push((at(ms), call, true)),
            Fate::Fail(ms) => events.push((at(ms), call, false)),
            Fate::Twice(first, second) => events.extend([(at(first), call, true), (at(second), call, true)]),
            Fate::Silence => {}
            Fate::Unsendable => return false,
        }
        true
    }

    /// Sends every unit to its first holder; how many calls that takes.
    fn begin(&self, attempts: &mut Attempts, events: &mut Vec<Happening>, hedges: &mut HedgeBudget) -> u32 {
        let mut first: Vec<(NodeIndex, Vec<Unit>)> = Vec::new();
        for holders in &self.units {
            let unit = attempts.unit(held_by(holders), 1);
            let node = *holders.iter().find(|node| **node != ROUTER).unwrap_or(&0);
            match first.iter_mut().find(|(known, _)| *known == node) {
                Some((_, units)) => units.push(unit),
                None => first.push((node, vec![unit])),
            }
        }
        for (node, units) in &first {
            let call = attempts.ask(*node, units, Duration::ZERO, BUDGET);
            hedges.earn();
            if !self.send(events, call, Duration::ZERO) {
                attempts.failed(call);
            }
        }
        first.len() as u32
    }
}

/// Lets the next thing happen, unless `until` is earlier; the time then.
fn wait(
    attempts: &mut Attempts,
    events: &mut Vec<Happening>,
    (now, until): (Duration, Duration),
) -> Duration {
    let next = events.iter().enumerate().min_by_key(|(_, (at, call, _))| (*at, *call));
    let Some((index, (at, call, answer))) = next.map(|(index, event)| (index, *event)) else { return until };
    if at > until {
        return until;
    }
    events.swap_remove(index);
    if answer {
        attempts.answered(call);
    } else {
        attempts.failed(call);
    }
    now.max(at)
}

/// Lives it, and says how many calls that are no hedges and how many hedges were sent.
fn live(life: &Life, hedges: &mut HedgeBudget) -> (u32, u64) {
    let standing = |node: NodeIndex| life.standing(node);
    let (mut attempts, mut events) = (Attempts::default(), Vec::new());
    attempts.clear(life.fallback);
    let calls = life.begin(&mut attempts, &mut events, hedges);
    let (mut now, mut dropped, mut accounted) = (Duration::ZERO, Vec::new(), vec![0; life.units.len()]);
    let mut account = |units: &[Unit]| units.iter().for_each(|unit| accounted[*unit as usize] += 1);
    for _ in 0..10_000 {
        match attempts.next(now, &standing, hedges) {
            Step::Send { call, .. } if life.send(&mut events, call, now) => {
                attempts.started(call, now, BUDGET)
            }
            Step::Send { call, .. } => attempts.failed(call),
            Step::Compute { units, mapped } => {
                assert!(!mapped || life.fallback);
                account(attempts.list(units));
            }
            Step::Lost(units) => {
                assert!(!life.fallback);
                account(attempts.list(units));
            }
            Step::Add(call) => {
                assert!(!dropped.contains(&call), "added after it was dropped");
                account(attempts.units_of(call));
            }
            Step::Drop(call, _) => dropped.push(call),
            Step::Overdue(..) => {}
            Step::Wait(until) => {
                assert!(until > now && until <= now + BUDGET.total, "{until:?} at {now:?}");
                now = wait(&mut attempts, &mut events, (now, until));
            }
            Step::Done => {
                assert!(accounted.iter().all(|times| *times == 1), "{accounted:?}");
                // Nothing that comes now matters.
                assert!(events.into_iter().all(|(_, call, _)| !attempts.answered(call)));
                assert_eq!(attempts.next(now, &standing, hedges), Step::Done);
                return (calls, attempts.counts().hedges);
            }
        }
    }
    panic!("no end");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn every_unit_is_accounted_for_once_whatever_happens(life in life()) {
        live(&life, &mut HedgeBudget::default());
    }

    #[test]
    fn hedges_stay_within_their_share(lives in prop::collection::vec(life(), 1..40)) {
        let mut hedges = HedgeBudget::default();
        let (mut calls, mut sent) = (0, 0);
        for life in &lives {
            let (more_calls, more_hedges) = live(life, &mut hedges);
            calls += more_calls;
            sent += more_hedges;
            prop_assert!(sent <= u64::from(HEDGE_BURST + calls / CALLS_PER_HEDGE));
        }
    }
}
