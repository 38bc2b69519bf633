//! A model small enough to be computed thousands of times: what it has in common with a real one is what can go wrong.
//!
//! Attention reads every earlier position of the sequence out of KV blocks, so a block that two sequences own changes
//! text. Experts are chosen by the row itself; a part of an expert is a pure function of (layer, expert, blocks, row), its
//! sums are integers, and a few do not fit in 32 bits. Every value depends on all that was computed before it: one sum
//! that is wrong, missing or counted twice gives other tokens.

use super::dice::mix;

/// Values of a row.
pub(crate) const HIDDEN: usize = 2;
/// Decoder layers, and which of them have experts.
pub(crate) const LAYERS: u16 = 4;
pub(crate) const MOE_LAYERS: [u16; 3] = [0, 2, 3];
/// Different tokens.
pub(crate) const VOCAB: u64 = 1000;
/// The token that ends a text before its time.
pub(crate) const END: u32 = 7;

pub(crate) type Row = [i64; HIDDEN];

#[derive(Clone, Copy, Debug)]
pub(crate) struct Toy {
    pub(crate) seed: u64,
    pub(crate) experts: u16,
    /// Blocks of one expert.
    pub(crate) blocks: u16,
    pub(crate) top_k: u16,
}

impl Toy {
    fn hash(&self, of: [i64; 4]) -> i64 {
        of.iter().fold(self.seed, |hash, value| mix(hash ^ *value as u64)) as i64
    }

    pub(crate) fn embed(&self, token: u32, position: usize) -> Row {
        [self.hash([1, token.into(), position as i64, 0]), self.hash([2, token.into(), position as i64, 0])]
    }

    /// What the cache keeps of a row.
    pub(crate) fn key(&self, layer: u16, x: &Row) -> i64 {
        self.hash([3, layer.into(), x[0], x[1]])
    }

    /// Attention over the keys of all positions up to this one.
    pub(crate) fn attend(&self, layer: u16, x: &mut Row, keys: impl Iterator<Item = i64>) {
        let read = keys
            .enumerate()
            .fold(0_i64, |sum, (position, key)| sum.wrapping_add(key.wrapping_mul(2 * position as i64 + 1)));
        *x = [self.hash([4, layer.into(), read, x[0]]), self.hash([5, layer.into(), read, x[1]])];
    }

    /// The experts of a row, all different.
    pub(crate) fn gate(&self, layer: u16, x: &Row) -> Vec<u16> {
        let mut left: Vec<u16> = (0..self.experts).collect();
        let choose = |choice| {
            let hash = self.hash([6 + i64::from(choice), layer.into(), x[0], x[1]]) as u64;
            left.swap_remove((hash % left.len() as u64) as usize)
        };
        (0..self.top_k.min(self.experts)).map(choose).collect()
    }

    /// The sums of blocks `from..to` of an expert.
    pub(crate) fn part(&self, (layer, expert): (u16, u16), (from, to): (u16, u16), x: &Row) -> Row {
        let mut sums = [0; HIDDEN];
        for block in from..to {
            let hash = self.hash([(i64::from(layer) << 32) + i64::from(expert), block.into(), x[0], x[1]]);
            // 26 bits; one block in 256 has 34, which no reply can carry as it is.
            let wide = if hash & 255 == 0 { 30 } else { 38 };
            sums[0] += hash >> wide;
            sums[1] += hash.wrapping_mul(0x5851_f42d_4c95_7f2d) >> wide;
        }
        sums
    }

    /// A row after its layer.
    pub(crate) fn finish(&self, layer: u16, x: &mut Row, sums: &Row) {
        *x = [self.hash([50, layer.into(), x[0], sums[0]]), self.hash([51, layer.into(), x[1], sums[1]])];
    }

    pub(crate) fn token(&self, x: &Row) -> u32 {
        (self.hash([60, x[0], x[1], 0]) as u64 % VOCAB) as u32
    }

    /// The whole model without any cluster: what every request has to come to.
    pub(crate) fn generate(&self, prompt: &[u32], tokens_max: usize) -> Vec<u32> {
        let mut keys: Vec<Vec<i64>> = vec![Vec::new(); usize::from(LAYERS)];
        let mut tokens = prompt.to_vec();
        for position in 0.. {
            let mut x = self.embed(tokens[position], position);
            for layer in 0..LAYERS {
                let own = &mut keys[usize::from(layer)];
                own.push(self.key(layer, &x));
                self.attend(layer, &mut x, own.iter().copied());
                let mut sums = [0_i64; HIDDEN];
                if MOE_LAYERS.contains(&layer) {
                    for expert in self.gate(layer, &x) {
                        let part = self.part((layer, expert), (0, self.blocks), &x);
                        sums.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
                    }
                }
                self.finish(layer, &mut x, &sums);
            }
            if position + 1 < tokens.len() {
                continue;
            }
            let token = self.token(&x);
            if token == END || tokens.len() - prompt.len() == tokens_max {
                break;
            }
            tokens.push(token);
            if tokens.len() - prompt.len() == tokens_max {
                break;
            }
        }
        tokens.split_off(prompt.len())
    }
}
