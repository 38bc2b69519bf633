//! Small layers are divided as well as any division can be, all are divided completely, and what is learned moves
//! work the right way.

use proptest::prelude::*;

use super::*;

/// A place whose experts cost this many microseconds, however many rows they have up to 256.
fn place(us: f32) -> Place {
    place_with_call(us, 0.0)
}

fn place_with_call(us: f32, call_us: f32) -> Place {
    let curve = Curve { us: [us; ROWS.len()] };
    Place { weight_mb_s: [1; ROWS.len()], curve, learned: Learned::with_call_us(call_us) }
}

fn rows_of(experts: &[u32]) -> Vec<Assignment> {
    let all = (0..).zip(experts);
    all.flat_map(|(expert, rows)| (0..*rows).map(move |row| Assignment { row, expert, weight: 1.0 }))
        .collect()
}

/// Divides and returns the place of every expert.
fn divide(
    share: &mut Share,
    experts: &[u32],
    places: &[Place],
    holders: &dyn Fn(u16, usize) -> Option<PlaceIndex>,
) -> Vec<PlaceIndex> {
    let assignments = rows_of(experts);
    let rows = experts.iter().copied().max().unwrap_or(0);
    let layer =
        Layer { assignments: &assignments, rows, busy_us: 0.0, mode: Mode::Alone, parts: &whole(holders) };
    share.divide(&layer, places);
    (0..experts.len() as u16).map(|expert| share.place(expert, 0)).collect()
}

/// Every expert on every place.
fn everywhere(places: usize) -> impl Fn(u16, usize) -> Option<PlaceIndex> {
    move |_, slot| (slot < places).then_some(slot as PlaceIndex)
}

/// When the last place is done, computed from scratch.
fn latest(chosen: &[PlaceIndex], experts: &[u32], places: &[Place]) -> f32 {
    let of = |index: usize| {
        let own = chosen.iter().zip(experts).filter(|(at, rows)| usize::from(**at) == index && **rows > 0);
        let us: f32 = own.clone().map(|(_, rows)| places[index].us(*rows)).sum();
        let rows = experts.iter().copied().max().unwrap_or(0);
        let start = if index == 0 { 0.0 } else { places[index].learned.start_us(Mode::Alone, rows) };
        if own.count() == 0 { 0.0 } else { start + us }
    };
    (0..places.len()).map(of).fold(0.0, f32::max)
}

/// The best of all divisions.
fn best(experts: &[u32], places: &[Place], holders: &dyn Fn(u16, usize) -> Option<PlaceIndex>) -> f32 {
    fn go(
        at: usize,
        chosen: &mut Vec<PlaceIndex>,
        (experts, places): (&[u32], &[Place]),
        holders: &dyn Fn(u16, usize) -> Option<PlaceIndex>,
    ) -> f32 {
        if at == experts.len() {
            return latest(chosen, experts, places);
        }
        let mut least = f32::INFINITY;
        for slot in 0.. {
            let Some(place) = holders(at as u16, slot) else { break };
            chosen.push(place);
            least = least.min(go(at + 1, chosen, (experts, places), holders));
            chosen.pop();
        }
        least
    }
    go(0, &mut Vec::new(), (experts, places), holders)
}

#[test]
fn equal_places_get_equal_parts() {
    let mut share = Share::default();
    let chosen = divide(&mut share, &[1; 8], &[place(100.0), place(100.0)], &everywhere(2));
    assert_eq!(chosen.iter().filter(|place| **place == ROUTER).count(), 4);
    assert_eq!((share.finish_us(0), share.finish_us(1), share.latest_us()), (400.0, 400.0, 400.0));
}

#[test]
fn a_slow_place_and_a_costly_call_get_less() {
    let mut share = Share::default();
    let here = |chosen: &[PlaceIndex]| chosen.iter().filter(|place| **place == ROUTER).count();
    let chosen = divide(&mut share, &[1; 8], &[place(100.0), place(300.0)], &everywhere(2));
    assert_eq!(here(&chosen), 6);
    let chosen = divide(&mut share, &[1; 8], &[place(100.0), place_with_call(100.0, 200.0)], &everywhere(2));
    assert_eq!(here(&chosen), 5);
    let chosen = divide(&mut share, &[1; 8], &[place(100.0), place_with_call(100.0, 5000.0)], &everywhere(2));
    assert_eq!(here(&chosen), 8);
}

#[test]
fn what_the_router_does_besides_is_taken_off_its_part() {
    let (mut share, assignments) = (Share::default(), rows_of(&[1; 8]));
    let holders = everywhere(2);
    let parts = whole(&holders);
    let layer = |busy_us, mode| Layer { assignments: &assignments, rows: 1, busy_us, mode, parts: &parts };
    let places = [place(100.0), place_with_call(100.0, 300.0)];
    let here = |share: &Share| (0..8).filter(|expert| share.place(*expert, 0) == ROUTER).count();
    share.divide(&layer(400.0, Mode::Overlapped), &places);
    assert_eq!(here(&share), 2);
    share.divide(&layer(100.0, Mode::Alone), &places);
    assert_eq!(here(&share), 5);
    share.divide(&layer(2000.0, Mode::Overlapped), &places);
    assert_eq!(here(&share), 0);
}

#[test]
fn an_expert_that_one_place_holds_is_computed_there() {
    let mut share = Share::default();
    // Expert 0 to 3 on node 1 only, 4 and 5 on the router only, 6 on both; node 2 is not known.
    let holders = |expert: u16, slot: usize| match (expert, slot) {
        (0..4, 0) => Some(1),
        (4 | 5, 0) => Some(ROUTER),
        (6, 0 | 1) => Some(slot as PlaceIndex),
        (7, 0) => Some(2),
        _ => None,
    };
    let chosen = divide(&mut share, &[1; 8], &[place(100.0), place(100.0)], &holders);
    assert_eq!(chosen, [1, 1, 1, 1, ROUTER, ROUTER, ROUTER, ROUTER]);
}

#[test]
fn slices_cost_their_width_and_are_divided_on_their_own() {
    // Each expert in thirds and two thirds; the first part on nodes 1 and 2, the second on 2 and 3.
    let parts = |_: u16, part: usize| match part {
        0 => Some(Choice::new(1.0 / 3.0, [1, 2])),
        1 => Some(Choice::new(2.0 / 3.0, [2, 3])),
        _ => None,
    };
    let assignments = rows_of(&[1; 6]);
    let layer = Layer { assignments: &assignments, rows: 1, busy_us: 0.0, mode: Mode::Alone, parts: &parts };
    let places = [place(1.0), place(90.0), place(90.0), place(90.0)];
    let mut share = Share::default();
    share.divide(&layer, &places);
    // 540 us of work for three equal places.
    assert!((share.latest_us() - 180.0).abs() < 1.0, "{}", share.latest_us());
    for expert in 0..6 {
        assert!([1, 2].contains(&share.place(expert, 0)) && [2, 3].contains(&share.place(expert, 1)));
        assert_eq!(share.place(expert, 2), ROUTER);
    }
    let predicted: f32 = (1..4).map(|at| share.predicted(at, &places[usize::from(at)]).us).sum();
    assert!((predicted - 540.0).abs() < 1.0, "{predicted}");
    assert!(!share.is_idle(ROUTER), "it could not have computed any");
}

#[test]
fn what_could_have_been_asked_and_was_not_is_idle() {
    let assignments = rows_of(&[1]);
    let parts = |_: u16, part: usize| (part == 0).then(|| Choice::new(1.0, [1, 2]));
    let layer = Layer { assignments: &assignments, rows: 1, busy_us: 0.0, mode: Mode::Alone, parts: &parts };
    let mut share = Share::default();
    share.divide(&layer, &[place(1.0), place(50.0), place(60.0), place(1.0)]);
    assert_eq!([0, 1, 2, 3].map(|place| share.is_idle(place)), [false, false, true, false]);
}

#[test]
fn room_is_made_by_way_of_a_third_place() {
    // Experts 0..4 are on node 1 or the router, 4..8 on node 2 or the router, which is taken by experts 8..12.
    let mut share = Share::default();
    let holders = |expert: u16, slot: usize| match (expert, slot) {
        (0..4, 0) => Some(1),
        (4..8, 0) => Some(2),
        (_, 0) => Some(ROUTER),
        (0..8, 1) => Some(ROUTER),
        _ => None,
    };
    let places = [place(100.0), place(50.0), place(400.0)];
    let experts = [1; 12];
    let chosen = divide(&mut share, &experts, &places, &holders);
    assert_eq!(latest(&chosen, &experts, &places), best(&experts, &places, &holders));
}

#[test]
fn nothing_to_divide_is_no_trouble() {
    let mut share = Share::default();
    assert_eq!(divide(&mut share, &[], &[place(1.0)], &everywhere(1)), Vec::<PlaceIndex>::new());
    assert_eq!(divide(&mut share, &[0, 3], &[], &everywhere(1)), [ROUTER, ROUTER]);
    assert_eq!(share.latest_us(), 0.0);
}

#[test]
fn a_curve_runs_through_what_was_measured() {
    let curve = Curve::new(&[1000, 500, 250, 0, 0], 1_000_000).unwrap();
    assert_eq!([1, 4, 16, 64, 256].map(|rows| curve.us(rows)), [1000.0, 2000.0, 4000.0, 16_000.0, 64_000.0]);
    assert_eq!((curve.us(0), curve.us(10), curve.us(512)), (1000.0, 3000.0, 128_000.0));
    // A disturbed measurement does not make more rows cheaper.
    let curve = Curve::new(&[1000, 4000, 0, 0, 0], 1_000_000).unwrap();
    assert_eq!(curve.us(4), 1000.0);
    assert_eq!(Curve::new(&[0; 5], 1), None);
}

#[test]
fn tables_and_hellos_count_the_same_rows() {
    assert_eq!(ROWS, mesh_proto::health::MEASURED_ROWS);
}

#[test]
fn measured_times_correct_the_table_by_number_of_rows() {
    let mut at = place(100.0);
    let few = Predicted { us: 400.0, few: true };
    (0..50).for_each(|_| at.learned.served(few, 800.0));
    assert!((at.us(1) - 200.0).abs() < 1.0 && (at.us(16) - 200.0).abs() < 1.0, "{at:?}");
    // One outlier of a thousand times is no more than a surprise.
    at.learned.served(few, 400_000.0);
    assert!(at.us(1) < 200.0 * (1.0 + SURPRISE_MAX / 8.0) + 1.0, "{at:?}");
    (0..50).for_each(|_| at.learned.served(Predicted { us: 400.0, few: false }, 100.0));
    assert!((at.us(16) - 25.0).abs() < 1.0, "{at:?}");
}

#[test]
fn only_a_real_wait_tells_what_a_call_costs() {
    let few = Predicted { us: 100.0, few: true };
    let mut learned = Learned::default();
    // It was there before anybody waited: no more than that, and perhaps less.
    learned.travelled(few, 1, (5000.0, LATE_US / 2.0));
    assert!(learned.call_us() < CALL_US && learned.call_us() > CALL_US * 0.9);
    (0..50).for_each(|_| learned.travelled(few, 1, (90.0, 0.0)));
    assert!(learned.call_us() <= 91.0);
    (0..50).for_each(|_| learned.travelled(few, 1, (300.0, LATE_US)));
    assert!((learned.call_us() - 300.0).abs() < 1.0);
}

#[test]
fn answers_that_lie_in_the_socket_do_not_keep_work_on_the_router() {
    // The answer is fetched when the router is done, so the round trip is never shorter than its own share.
    let (mut share, mut places) = (Share::default(), [place(100.0), place(100.0)]);
    let few = Predicted { us: 100.0, few: true };
    (0..20).for_each(|_| places[1].learned.travelled(few, 1, (600.0, LATE_US)));
    let mut here = 8;
    for _ in 0..400 {
        let chosen = divide(&mut share, &[1; 8], &places, &everywhere(2));
        here = chosen.iter().filter(|place| **place == ROUTER).count();
        let (own, there) = (here as f32 * 100.0, (8 - here) as f32 * 100.0);
        // Truly 120 us, and 60 us to fetch it.
        let waited = (there + 120.0 - own).max(60.0);
        if here < 8 {
            places[1].learned.travelled(few, 1, (own + waited - there, waited));
        } else {
            places[1].learned.idle();
        }
    }
    assert!((4..=5).contains(&here), "{here} of 8 on the router");
}

#[test]
fn a_place_that_was_given_up_is_tried_again() {
    let mut share = Share::default();
    let mut places = [place(100.0), place(100.0)];
    (0..50).for_each(|_| places[1].learned.served(Predicted { us: 100.0, few: true }, 6400.0));
    (0..50).for_each(|_| {
        places[1].learned.travelled(Predicted { us: 100.0, few: true }, 1, (50_000.0, LATE_US))
    });
    let gets =
        |share: &mut Share, places: &[Place]| divide(share, &[1; 8], places, &everywhere(2)).contains(&1);
    assert!(!gets(&mut share, &places));
    let mut layers = 0;
    while !gets(&mut share, &places) {
        assert!(share.is_idle(1));
        places[1].learned.idle();
        layers += 1;
        assert!(layers < 1000, "{places:?}");
    }
}

/// What happens to the second of two places while layers of eight experts pass, and how often it got something: it
/// takes `really` microseconds for an expert.
fn lives(places: &mut [Place; 2], really: f32, layers: u32) -> (Vec<u32>, usize) {
    let (mut share, mut tries, mut there) = (Share::default(), Vec::new(), 0);
    for layer in 0..layers {
        let chosen = divide(&mut share, &[1; 8], places, &everywhere(2));
        there = chosen.iter().filter(|place| **place == 1).count();
        if there > 0 {
            tries.push(layer);
            let predicted = share.predicted(1, &places[1]);
            places[1].learned.served(predicted, there as f32 * really);
        } else {
            places[1].learned.idle();
        }
    }
    (tries, there)
}

#[test]
fn a_table_that_is_a_hundred_times_too_slow_is_found_out() {
    let mut places = [place(100.0), place(10_000.0)];
    let (tries, there) = lives(&mut places, 100.0, 1000);
    assert!(tries[0] < 400 && (3..=5).contains(&there), "{there} of 8, tried at {:?}", tries.first());
    // What was known is no better than the table: it became fast.
    let mut places = [place(100.0), place(100.0)];
    (0..50).for_each(|_| places[1].learned.served(Predicted { us: 100.0, few: true }, 10_000.0));
    let (_, there) = lives(&mut places, 100.0, 1000);
    assert!((3..=5).contains(&there), "{there} of 8");
}

#[test]
fn a_place_that_is_hopeless_is_tried_ever_more_rarely() {
    let mut places = [place(100.0), place(10_000.0)];
    let (tries, _) = lives(&mut places, 10_000.0, 20_000);
    assert!((3..=9).contains(&tries.len()), "{tries:?}");
    assert!(tries.windows(3).all(|try_| try_[2] - try_[1] > try_[1] - try_[0]), "{tries:?}");
    // Prompts are no trials.
    places[1].learned.hope = HOPE_MAX;
    let chosen = divide(&mut Share::default(), &[64; 8], &places, &everywhere(2));
    assert!(!chosen.contains(&1), "{chosen:?}");
}

#[test]
fn a_lag_comes_to_rest_where_nobody_waits() {
    // The place is 1.5 times as slow as it says, and the step waits for the difference.
    let (mut share, assignments) = (Share::default(), rows_of(&[16; 64]));
    let holders = everywhere(2);
    let mut places = [place(100.0), place(100.0)];
    let mut waited = 0.0;
    for _ in 0..200 {
        let layer = Layer {
            assignments: &assignments,
            rows: 256,
            busy_us: 2000.0,
            mode: Mode::Overlapped,
            parts: &whole(&holders),
        };
        share.divide(&layer, &places);
        let there = (0..64).filter(|expert| share.place(*expert, 0) == 1).count() as f32;
        waited = (there * 150.0 - (2000.0 + (64.0 - there) * 100.0)).max(0.0);
        places[1].learned.lagged(256, waited);
    }
    assert!(waited < 500.0, "waits {waited} us");
    let there = (0..64).filter(|expert| share.place(*expert, 0) == 1).count();
    assert!((29..=35).contains(&there), "{there} of 64");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn small_layers_are_within_an_expert_of_the_best_division(
        experts in prop::collection::vec(1_u32..40, 1..7),
        costs in prop::collection::vec((20.0_f32..400.0, 0.0_f32..300.0), 1..4),
        holds in prop::collection::vec(1_u8..8, 7),
    ) {
        let places: Vec<Place> = costs
            .iter()
            .map(|(us, call)| Place { curve: Curve { us: [*us, us * 1.5, us * 3.0, us * 8.0, us * 20.0] }, ..place_with_call(*us, *call) })
            .collect();
        // A set of places for each expert, of those there are; never none.
        let holders = |expert: u16, slot: usize| -> Option<PlaceIndex> {
            let set = holds[usize::from(expert)];
            let mut own = (0..places.len() as u16).filter(|place| set >> place & 1 == 1 || (*place == 0 && set & ((1 << places.len()) - 1) == 0));
            own.nth(slot)
        };
        let mut share = Share::default();
        let chosen = divide(&mut share, &experts, &places, &holders);
        for (expert, at) in chosen.iter().enumerate() {
            let held = (0..).map_while(|slot| holders(expert as u16, slot)).any(|place| place == *at);
            prop_assert!(held, "expert {expert} at {at}, which does not hold it");
        }
        let largest = experts.iter().flat_map(|rows| places.iter().map(move |place| place.us(*rows))).fold(0.0, f32::max);
        let (ours, least) = (latest(&chosen, &experts, &places), best(&experts, &places, &holders));
        prop_assert!(ours <= least + largest, "{ours} us, possible are {least}");
        prop_assert!((share.latest_us() - ours).abs() < 0.01 * ours + 1.0, "{} for {ours}", share.latest_us());
        // The same again, with memory that was used.
        prop_assert_eq!(&divide(&mut share, &experts, &places, &holders), &chosen);
    }

    #[test]
    fn a_decode_row_is_divided_as_well_as_can_be(
        nodes in 1_usize..4,
        costs in prop::collection::vec((50.0_f32..400.0, 0.0_f32..300.0), 4),
    ) {
        // Eight equal experts, each on one node and the router.
        let places: Vec<Place> = costs[..=nodes].iter().map(|(us, call)| place_with_call(*us, *call)).collect();
        let holders = |expert: u16, slot: usize| match slot {
            0 => Some(1 + expert % nodes as u16),
            1 => Some(ROUTER),
            _ => None,
        };
        let experts = [1_u32; 8];
        let chosen = divide(&mut Share::default(), &experts, &places, &holders);
        let (ours, least) = (latest(&chosen, &experts, &places), best(&experts, &places, &holders));
        prop_assert!(ours <= least * 1.001 + 2.0 * GAIN_US, "{ours} us, possible are {least}: {chosen:?}");
    }
}
