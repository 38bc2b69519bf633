//! Who was right about a sample: other holders are asked, and where they do not settle it the router computes.
//!
//! Kernels of the exact class give one result on every machine, so two answers that differ prove that one of them is
//! wrong, and the router's own, from its own copy of the weights, says which. Replicas may lie alike: a fixed share of
//! all audits (`HOME_SHARE`) is the router's from the start, whoever holds the experts.
//!
//! A verdict shuts a machine out, so the judge doubts itself first: before it calls a node wrong it compares the hashes
//! of its own copies of the experts with the manifest, loads them anew and computes again. Where its own figures do not
//! stand, nobody is judged, and the log names what is damaged. The price: an audit that finds something costs twice.

use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_proto::routes::{NodeIndex, ROUTER};
use model::home::{Home, HomeError, Residency};
use model::kernel::{Assignment, Kernels};
use model::open::Model;
use model::packed::TensorName;

use super::draws::{Draws, Share};
use super::sample::{Answer, Difference, Piece, Sample};

/// Audits that the router computes itself, whoever else could. Two holders that lie alike are found by these alone, so it
/// must not be small: with a quarter, colluders last four times as long as one liar (of `--audit 0.01`, one call in 400
/// is the router's). It must not be large either: the router is the machine that everybody waits for, and a quarter of
/// one hundredth of the experts' work is what it can do beside its own.
pub const HOME_SHARE: f64 = 0.25;

/// Bytes of experts that the judge keeps, mapped or cut or made; beyond, it lets go of all. Experts of an audit are
/// others each time, and a router that maps a model does so because it does not fit.
const KEPT_BYTES_MAX: u64 = 256 << 20;

/// What came of an audit, for one node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Its sums are those of others.
    Right,
    /// They are not, and the router's own computation says that this node is the one who is wrong.
    Wrong(Difference),
    /// Nobody could tell, and why.
    Unchecked(String),
}

/// Other nodes, as a judge sees them.
pub trait Others {
    /// Whether a node can be asked to compute a part of this sample.
    fn can_be_asked(&self, sample: &Sample, node: NodeIndex) -> bool;

    /// Asks it; the `number`-th call of this sample. None where no answer came.
    fn ask(&mut self, sample: &Sample, node: NodeIndex, pieces: &[Piece], number: usize) -> Option<Answer>;
}

/// Who was asked, for what, and what it said.
struct Repeated {
    node: NodeIndex,
    pieces: Vec<Piece>,
    answer: Answer,
}

/// See the module.
#[derive(Debug)]
pub struct Judge {
    model: Arc<Model>,
    kernels: Arc<dyn Kernels>,
    home: Home,
    draws: Draws,
    home_share: Share,
    worked: Duration,
}

impl Judge {
    /// One that computes with `kernels`, which must be exact, on the router's copy of the model.
    pub fn new(model: Arc<Model>, kernels: Arc<dyn Kernels>, draws: Draws) -> Judge {
        let home = Home::new(Arc::clone(&model), Arc::clone(&kernels), Residency::Mapped);
        Judge { model, kernels, home, draws, home_share: Share::new(HOME_SHARE), worked: Duration::ZERO }
    }

    /// Audits a sample; the first outcome is that of its node, others are of nodes that were asked and found wrong.
    pub fn check(&mut self, sample: &Sample, others: &mut dyn Others) -> Vec<(NodeIndex, Outcome)> {
        if sample.answer.is_void() {
            return vec![(sample.node, Outcome::Unchecked("it left all rows to the router".into()))];
        }
        let elsewhere = !self.draws.happens(self.home_share);
        let repeated = if elsewhere { repeat(sample, others) } else { Vec::new() };
        if agree(sample, &repeated) {
            return vec![(sample.node, Outcome::Right)];
        }
        let mut outcomes = vec![(sample.node, self.compare(sample, &sample.pieces, &sample.answer))];
        for Repeated { node, pieces, answer } in &repeated {
            let outcome = self.compare(sample, pieces, answer);
            outcomes.extend((outcome != Outcome::Right).then_some((*node, outcome)));
        }
        if self.home.weight_bytes() > KEPT_BYTES_MAX {
            self.forget();
        }
        outcomes
    }

    /// How long it has computed so far.
    pub fn worked(&self) -> Duration {
        self.worked
    }

    /// An answer to some pieces of a sample against the router's own.
    fn compare(&mut self, sample: &Sample, pieces: &[Piece], answer: &Answer) -> Outcome {
        let unchecked = |error: HomeError| Outcome::Unchecked(error.to_string());
        let truth = match self.compute(sample, pieces) {
            Ok(truth) => truth,
            Err(error) => return unchecked(error),
        };
        let Some(difference) = answer.differs(&truth) else { return Outcome::Right };
        if let Some(damaged) = self.damaged(sample, pieces) {
            tracing::error!(
                "{damaged}; no node is judged by it. Delete its folder in the cache: it is packed anew"
            );
            return Outcome::Unchecked(damaged);
        }
        self.forget();
        match self.compute(sample, pieces) {
            Ok(again) if again == truth => Outcome::Wrong(difference),
            Ok(_) => {
                let unsure = "the router computed two results for one call; is its memory sound?";
                tracing::error!("{unsure}");
                Outcome::Unchecked(unsure.into())
            }
            Err(error) => unchecked(error),
        }
    }

    /// The sums of some pieces of a sample, computed here.
    ///
    /// # Errors
    /// What cannot be loaded or computed.
    pub fn compute(&mut self, sample: &Sample, pieces: &[Piece]) -> Result<Answer, HomeError> {
        let began = Instant::now();
        let mut sums = vec![0; sample.row_count() * sample.hidden()];
        let Some(x) = sample.activations() else { return Ok(Answer::default()) };
        let mut parts: Vec<(u16, u16)> = pieces.iter().map(|piece| piece.blocks).collect();
        parts.sort_unstable();
        parts.dedup();
        for blocks in parts {
            let same = pieces.iter().filter(|piece| piece.blocks == blocks);
            let assignments: Vec<Assignment> = same.map(|piece| piece.assignment).collect();
            self.home.add_slice(usize::from(sample.layer), blocks, (x, &assignments), &mut sums)?;
        }
        self.worked += began.elapsed();
        Ok(Answer::new(sample.hidden(), sums))
    }

    /// Which of the router's own experts are not what the manifest says, in words.
    fn damaged(&self, sample: &Sample, pieces: &[Piece]) -> Option<String> {
        let mut experts: Vec<u16> = pieces.iter().map(|piece| piece.assignment.expert).collect();
        experts.sort_unstable();
        experts.dedup();
        let bad = experts.into_iter().find(|expert| {
            let bytes = self.model.expert(usize::from(sample.layer), usize::from(*expert));
            let hash = self.model.hash(TensorName::Expert(sample.layer, *expert));
            !matches!((bytes, hash), (Ok(own), Ok(hash)) if *blake3::hash(&own.bytes).as_bytes() == hash)
        })?;
        let (layer, model) = (sample.layer, &self.model.name);
        Some(format!("the router's own copy of expert {bad} of layer {layer} of {model} is damaged"))
    }

    fn forget(&mut self) {
        self.home = Home::new(Arc::clone(&self.model), Arc::clone(&self.kernels), Residency::Mapped);
    }
}

/// Whether others were asked and all of them together say what the node said.
fn agree(sample: &Sample, repeated: &[Repeated]) -> bool {
    let Some((first, rest)) = repeated.split_first() else { return false };
    let mut sum = first.answer.clone();
    rest.iter().for_each(|part| sum.add(&part.answer));
    sample.answer.is_covered_by(&sum) && sample.answer.differs(&sum).is_none()
}

/// Asks other holders for all of a sample, each for as much as it holds. Nobody, if not all of it can be had.
fn repeat(sample: &Sample, others: &mut dyn Others) -> Vec<Repeated> {
    let mut shares: Vec<(NodeIndex, Vec<Piece>)> = Vec::new();
    for piece in &sample.pieces {
        let Some(node) = another(sample, piece, others, &shares) else { return Vec::new() };
        match shares.iter_mut().find(|(known, _)| *known == node) {
            Some((_, pieces)) => pieces.push(*piece),
            None => shares.push((node, vec![*piece])),
        }
    }
    let mut repeated = Vec::with_capacity(shares.len());
    for (number, (node, pieces)) in shares.into_iter().enumerate() {
        let Some(answer) = others.ask(sample, node, &pieces, number) else { return Vec::new() };
        repeated.push(Repeated { node, pieces, answer });
    }
    repeated
}

/// Another holder of the same blocks, one that is to be asked for something already where there is one.
fn another(
    sample: &Sample,
    piece: &Piece,
    others: &dyn Others,
    shares: &[(NodeIndex, Vec<Piece>)],
) -> Option<NodeIndex> {
    let parts = sample.routes.table.parts(sample.layer, piece.assignment.expert);
    let part = parts.iter().find(|part| (part.from, part.to) == piece.blocks)?;
    let holders = part.holders.as_slice().iter().copied();
    let mut able =
        holders.filter(|node| *node != ROUTER && *node != sample.node && others.can_be_asked(sample, *node));
    let known = |node: &NodeIndex| shares.iter().any(|(asked, _)| asked == node);
    able.clone().find(known).or_else(|| able.next())
}
