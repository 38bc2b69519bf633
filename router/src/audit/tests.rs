//! Who is found and who is not, with other holders as functions; and the bounds of what waits.

use super::*;
use crate::audit::judge::Others;
use crate::audit::sample::{Answer, Piece};
use mesh_proto::facts::ModelFacts;
use mesh_proto::routes::{Part, Routes, Table};
use model::activations::row_bytes;
use model::format::Format;
use model::kernel::Assignment;

/// A layer of experts of eight blocks.
const MODEL: &str = "synthetic:olmoe-1b-7b?layers=1&seed=3";

const HIDDEN: usize = 2048;

fn model() -> Arc<Model> {
    let cache = tempfile::tempdir().unwrap();
    Arc::new(Model::open(MODEL, Format::Q8, cache.path(), &mut |_, _, _| {}).unwrap())
}

fn judge(model: &Arc<Model>, secret: u8) -> Judge {
    let kernels = Arc::new(Native::new(NativeConfig::threads(1)).unwrap());
    Judge::new(Arc::clone(model), kernels, Draws::new(&[secret; 32]))
}

/// Expert 0 whole on nodes 0, 1 and 2; expert 1 cut in two, on 0 and 1, and on 0 and 2.
fn routes(model: &Model) -> Arc<Routes> {
    let facts =
        ModelFacts { moe_layers: vec![0], experts: 2, blocks: blocks(model), ..ModelFacts::default() };
    let part = |from, to, nodes: &[NodeIndex]| Part { from, to, holders: nodes.iter().copied().collect() };
    let mut table = Table::empty(&facts);
    let all = blocks(model);
    table.set_layer(
        0,
        [vec![part(0, all, &[0, 1, 2])], vec![part(0, 3, &[0, 1]), part(3, all, &[0, 2])]].iter(),
    );
    Arc::new(Routes { epoch: 7, table, spared: Vec::new() })
}

fn blocks(model: &Model) -> u16 {
    (model.config.moe.inter / 128) as u16
}

/// Two rows, of node 0: the first through both experts, the second through one. Without an answer.
fn unanswered(model: &Model) -> Sample {
    let hidden = model.config.hidden;
    let row: Vec<u8> = {
        let mut bytes = vec![0; row_bytes(Format::Q8, hidden)];
        bytes[..hidden].iter_mut().zip(0_u8..).for_each(|(byte, value)| *byte = value % 100);
        for scale in bytes[hidden..].chunks_exact_mut(4).take(hidden / 32) {
            scale.copy_from_slice(&0.01_f32.to_le_bytes());
        }
        bytes
    };
    let rows = [row.as_slice(), row.as_slice()];
    let mut sample = Sample::new((Format::Q8, hidden, 2), rows.into_iter(), routes(model));
    let piece =
        |row, expert, blocks, weight| Piece { assignment: Assignment { row, expert, weight }, blocks };
    let all = blocks(model);
    sample.pieces = vec![piece(0, 0, (0, all), 0.5), piece(0, 1, (0, 3), 0.25), piece(1, 0, (0, all), 1.0)];
    sample.exact = [true, true, true].into();
    sample.numbers = 100..103;
    sample
}

/// What each node does to what it should answer.
type Does = fn(Answer) -> Option<Answer>;

struct Cast<'a> {
    honest: &'a mut Judge,
    does: [Does; 3],
    asked: Vec<(NodeIndex, usize)>,
}

impl Others for Cast<'_> {
    fn can_be_asked(&self, sample: &Sample, node: NodeIndex) -> bool {
        sample.exact[usize::from(node)]
    }

    fn ask(&mut self, sample: &Sample, node: NodeIndex, pieces: &[Piece], number: usize) -> Option<Answer> {
        self.asked.push((node, number));
        let right = self.honest.compute(sample, pieces).unwrap();
        self.does[usize::from(node)](right)
    }
}

fn right(answer: Answer) -> Option<Answer> {
    Some(answer)
}

/// As the lie of one who is off by one in the first row.
fn wrong(mut answer: Answer) -> Option<Answer> {
    let mut lie = vec![0; 2 * HIDDEN];
    lie[1] = 1;
    answer.add(&Answer::new(HIDDEN, lie));
    Some(answer)
}

fn silent(_: Answer) -> Option<Answer> {
    None
}

/// What one audit found, and who was asked under which number.
type Audited = (Vec<(NodeIndex, Outcome)>, Vec<(NodeIndex, usize)>);

/// Many audits of the same call with different draws.
fn audited(does: [Does; 3], exact: [bool; 3]) -> Vec<Audited> {
    let model = model();
    let (mut judge, mut honest) = (judge(&model, 1), judge(&model, 2));
    let mut sample = unanswered(&model);
    sample.exact = exact.into();
    let truth = honest.compute(&sample, &sample.pieces).unwrap();
    sample.answer = does[0](truth).unwrap();
    let mut seen = Vec::new();
    for _ in 0..24 {
        let mut cast = Cast { honest: &mut honest, does, asked: Vec::new() };
        let outcomes = judge.check(&sample, &mut cast);
        seen.push((outcomes, cast.asked));
    }
    seen
}

fn off_by_one(of_rows: usize) -> Outcome {
    Outcome::Wrong(Difference { rows: 1, sums: 1, of_rows })
}

#[test]
fn an_honest_node_is_right_whoever_looks() {
    let seen = audited([right; 3], [true; 3]);
    assert!(seen.iter().all(|(outcomes, _)| *outcomes == [(0, Outcome::Right)]));
    let elsewhere = seen.iter().filter(|(_, asked)| !asked.is_empty()).count();
    assert!((1..24).contains(&elsewhere), "{elsewhere} of 24 elsewhere");
    // One that holds all of it.
    assert!(seen.iter().all(|(_, asked)| asked.is_empty() || *asked == [(1, 0)]));
}

#[test]
fn a_lie_of_one_in_one_sum_is_found_and_nobody_else_is_blamed() {
    let seen = audited([wrong, right, right], [true; 3]);
    assert!(seen.iter().all(|(outcomes, _)| *outcomes == [(0, off_by_one(2))]), "{seen:?}");
}

#[test]
fn of_two_that_differ_the_router_knows_who_lied() {
    for (outcomes, asked) in audited([right, wrong, right], [true; 3]) {
        let liar = (1, off_by_one(2));
        let expected =
            if asked.is_empty() { vec![(0, Outcome::Right)] } else { vec![(0, Outcome::Right), liar] };
        assert_eq!(outcomes, expected);
    }
}

#[test]
fn two_that_lie_alike_are_found_by_the_router_alone() {
    let seen = audited([wrong, wrong, wrong], [true; 3]);
    for (outcomes, asked) in &seen {
        let lied = if asked.is_empty() { off_by_one(2) } else { Outcome::Right };
        assert_eq!(*outcomes, [(0, lied)]);
    }
    assert!(seen.iter().any(|(_, asked)| asked.is_empty()));
}

#[test]
fn where_nobody_answers_or_may_be_asked_the_router_looks_itself() {
    let mute: [Does; 3] = [wrong, silent, silent];
    let lone: [Does; 3] = [wrong, right, right];
    for (does, exact) in [(mute, [true; 3]), (lone, [true, false, false])] {
        for (outcomes, _) in audited(does, exact) {
            assert_eq!(outcomes, [(0, off_by_one(2))]);
        }
    }
}

#[test]
fn what_was_left_to_the_router_is_neither_right_nor_wrong() {
    let model = model();
    let mut sample = unanswered(&model);
    let pool = mesh_wire::buffer::Pool::new(1 << 20);
    let head = mesh_wire::reply::ReplyHead { call: 1, service_us: 1, hidden: sample.hidden() as u32 };
    let frame = mesh_wire::reply::encode_sums(&pool, head, &[None, None]).unwrap();
    let reply = mesh_wire::reply::Reply::parse(frame).unwrap();
    sample.answer = Answer::of(&reply.view(), &[0, 1]);
    let (mut judge, mut honest) = (judge(&model, 1), judge(&model, 2));
    let mut cast = Cast { honest: &mut honest, does: [right; 3], asked: Vec::new() };
    let outcomes = judge.check(&sample, &mut cast);
    assert!(matches!(outcomes[..], [(0, Outcome::Unchecked(_))]), "{outcomes:?}");
}

#[test]
fn a_full_ledger_takes_no_more_and_a_closed_one_ends_the_thread() {
    let model = model();
    let ledger = Ledger::default();
    let taken = (0..SAMPLES_MAX + 10).filter(|_| ledger.push(unanswered(&model))).count();
    assert_eq!(taken, SAMPLES_MAX);
    assert!(ledger.next().is_some() && ledger.push(unanswered(&model)));
    ledger.close();
    assert!(ledger.next().is_none() && !ledger.push(unanswered(&model)));
    let small = Ledger::default();
    small.waiting().bytes = BYTES_MAX;
    assert!(!small.push(unanswered(&model)), "bytes count, too");
}
