//! A call as an audit needs it: the rows as they were sent, who was to do what with them, and the sums that came back.
//!
//! What one row's sums are does not depend on the other rows of its call, so of a large call a few rows are kept, drawn
//! after it was answered: an audit then costs the same for a prompt as for a token. Sums are compared by value, whether
//! they came as i16 or i32. A row of which the node said that it overflows has no value: the router computes such a row
//! itself before any text depends on it, so there is nothing in it to be right or wrong.

use std::ops::Range;
use std::sync::Arc;

use mesh_proto::routes::{NodeIndex, Routes};
use mesh_wire::reply::{ReplyView, Row};
use model::activations::{Activations, row_bytes};
use model::format::Format;
use model::kernel::Assignment;
use model::region::Buffer;

/// Sums of some rows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    hidden: usize,
    /// `[rows, hidden]`; those of rows without a value mean nothing.
    sums: Vec<i64>,
    /// By row: whether it has a value.
    known: Vec<bool>,
}

/// By how much two answers differ.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Difference {
    /// Rows with a sum that differs.
    pub rows: usize,
    /// Sums that differ.
    pub sums: usize,
    /// Rows that were compared.
    pub of_rows: usize,
}

impl Answer {
    /// Of these sums, `[rows, hidden]`, all rows with a value.
    pub fn new(hidden: usize, sums: Vec<i64>) -> Answer {
        let rows = sums.len().checked_div(hidden).unwrap_or(0);
        Answer { hidden, sums, known: vec![true; rows] }
    }

    /// Of a reply, the rows at these places, ascending.
    pub fn of(reply: &ReplyView<'_>, places: &[usize]) -> Answer {
        let hidden = reply.head().hidden as usize;
        let mut answer = Answer { hidden, ..Answer::default() };
        let mut wanted = places.iter().copied().peekable();
        for (place, row) in reply.rows().enumerate() {
            if wanted.next_if_eq(&place).is_none() {
                continue;
            }
            answer.known.push(!matches!(row, Row::Overflow));
            match row {
                Row::I16(sums) => answer.sums.extend(sums.iter().map(|sum| i64::from(*sum))),
                Row::I32(sums) => answer.sums.extend(sums.iter().map(|sum| i64::from(*sum))),
                Row::Overflow => answer.sums.resize(answer.sums.len() + hidden, 0),
            }
        }
        answer
    }

    /// Whether no row has a value.
    pub fn is_void(&self) -> bool {
        !self.known.contains(&true)
    }

    /// Adds what others computed of the same rows.
    pub fn add(&mut self, part: &Answer) {
        self.sums.iter_mut().zip(&part.sums).for_each(|(sum, part)| *sum = sum.wrapping_add(*part));
        self.known.iter_mut().zip(&part.known).for_each(|(known, part)| *known &= part);
    }

    /// Whether the other has a value wherever this one has.
    pub fn is_covered_by(&self, other: &Answer) -> bool {
        self.known.len() == other.known.len()
            && self.known.iter().zip(&other.known).all(|(this, other)| !this || *other)
    }

    /// How they differ, in rows that both have a value of; none where they do not.
    pub fn differs(&self, other: &Answer) -> Option<Difference> {
        let mut difference = Difference::default();
        let hidden = self.hidden.max(1);
        let rows = self.sums.chunks_exact(hidden).zip(other.sums.chunks_exact(hidden));
        for ((this, that), (known, also)) in rows.zip(self.known.iter().zip(&other.known)) {
            if !(*known && *also) {
                continue;
            }
            let wrong = this.iter().zip(that).filter(|(a, b)| a != b).count();
            difference.of_rows += 1;
            difference.rows += usize::from(wrong > 0);
            difference.sums += wrong;
        }
        (difference.rows > 0).then_some(difference)
    }
}

/// An assignment, and which blocks of its expert it is about.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Piece {
    /// Its row is one of the sample's.
    pub assignment: Assignment,
    /// From and to.
    pub blocks: (u16, u16),
}

/// See the module.
#[derive(Debug)]
pub struct Sample {
    /// Who answered.
    pub node: NodeIndex,
    /// The step it was for.
    pub step: u64,
    /// The layer.
    pub layer: u16,
    /// What was asked, rows ascending.
    pub pieces: Vec<Piece>,
    /// What came back.
    pub answer: Answer,
    /// Who held what, and of which epoch the call was.
    pub routes: Arc<Routes>,
    /// By node: whether it computes the bits of the definition.
    pub exact: Arc<[bool]>,
    /// Numbers that calls may take for asking others.
    pub numbers: Range<u64>,
    /// Requests that were served since the node is here.
    pub requests: u64,
    rows: KeptRows,
}

/// Rows as they travel.
#[derive(Debug)]
struct KeptRows {
    format: Format,
    hidden: usize,
    count: usize,
    bytes: Buffer,
}

impl Sample {
    /// A sample of nothing yet: `rows` are the bytes of `count` rows `hidden` wide, as kernels for `format` take them.
    pub fn new<'r>(
        (format, hidden, count): (Format, usize, usize),
        rows: impl Iterator<Item = &'r [u8]>,
        routes: Arc<Routes>,
    ) -> Sample {
        let stride = row_bytes(format, hidden);
        let mut bytes = Buffer::zeroed(count * stride);
        for (to, from) in bytes.chunks_exact_mut(stride.max(1)).zip(rows) {
            let len = from.len().min(stride);
            to[..len].copy_from_slice(&from[..len]);
        }
        Sample {
            node: 0,
            step: 0,
            layer: 0,
            pieces: Vec::new(),
            answer: Answer::default(),
            routes,
            exact: Arc::default(),
            numbers: 0..0,
            requests: 0,
            rows: KeptRows { format, hidden, count, bytes },
        }
    }

    /// How many rows.
    pub fn row_count(&self) -> usize {
        self.rows.count
    }

    /// Values of a row.
    pub fn hidden(&self) -> usize {
        self.rows.hidden
    }

    /// Format of the weights that they are for.
    pub fn format(&self) -> Format {
        self.rows.format
    }

    /// The rows; none where their length does not fit, which is a defect of this program.
    pub fn activations(&self) -> Option<Activations<'_>> {
        let KeptRows { format, hidden, count, bytes } = &self.rows;
        let len = count * row_bytes(*format, *hidden);
        Activations::new(*format, *count, *hidden, &bytes[..len])
    }

    /// Each row's bytes.
    pub fn row_bytes(&self) -> impl Iterator<Item = &[u8]> {
        let stride = row_bytes(self.rows.format, self.rows.hidden);
        self.rows.bytes.chunks_exact(stride.max(1)).take(self.rows.count)
    }

    /// Bytes that it takes.
    pub fn bytes(&self) -> usize {
        let sums = self.answer.sums.len() * size_of::<i64>();
        sums + self.rows.bytes.len() + self.pieces.len() * size_of::<Piece>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_wire::buffer::Pool;
    use mesh_wire::reply::{Reply, ReplyHead, encode_sums};

    fn reply(rows: &[Option<&[i32]>]) -> Reply {
        let pool = Pool::new(1 << 20);
        let head = ReplyHead { call: 1, service_us: 1, hidden: 4 };
        Reply::parse(encode_sums(&pool, head, rows).unwrap()).unwrap()
    }

    #[test]
    fn sums_are_compared_by_value_and_overflow_has_none() {
        let narrow = reply(&[Some(&[1, -2, 3, 4]), Some(&[5; 4]), None]);
        // The same values beside one that needs more room.
        let wide = reply(&[Some(&[1, -2, 3, 4]), Some(&[5, 5, 5, 1 << 20]), Some(&[0; 4])]);
        let all = [0, 1, 2];
        let (a, b) = (Answer::of(&narrow.view(), &all), Answer::of(&wide.view(), &all));
        assert_eq!(a.differs(&b), Some(Difference { rows: 1, sums: 1, of_rows: 2 }));
        let (a, b) = (Answer::of(&narrow.view(), &[0, 2]), Answer::of(&wide.view(), &[0, 2]));
        assert_eq!(a.differs(&b), None);
        assert!(a.is_covered_by(&b) && !b.is_covered_by(&a));
        assert!(Answer::of(&narrow.view(), &[2]).is_void());
    }

    #[test]
    fn parts_add_up_and_what_one_does_not_know_nobody_does() {
        let mut whole = Answer::new(2, vec![1, 2, 3, 4]);
        whole.add(&Answer::new(2, vec![10, 20, 30, 40]));
        assert_eq!(whole, Answer::new(2, vec![11, 22, 33, 44]));
        let unknown = Answer { known: vec![true, false], ..Answer::new(2, vec![0; 4]) };
        whole.add(&unknown);
        assert!(whole.is_covered_by(&unknown) && !whole.is_void());
        assert_eq!(whole.differs(&Answer::new(2, vec![11, 22, 9, 9])), None);
    }

    #[test]
    fn rows_are_kept_as_they_were_sent() {
        let stride = row_bytes(Format::Q8, 40);
        let rows: Vec<Vec<u8>> = (1..4).map(|byte| vec![byte; stride]).collect();
        let kept = Sample::new((Format::Q8, 40, 3), rows.iter().map(Vec::as_slice), Arc::default());
        assert_eq!(kept.activations().unwrap().rows(), 3);
        assert!(kept.row_bytes().eq(rows.iter().map(Vec::as_slice)));
        assert!(kept.bytes() >= 3 * stride);
    }
}
