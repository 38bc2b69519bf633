//! What the router lends to nodes: every expert of its packed model, whole or in slices.
//!
//! What is lent is read from the packed directory, or made from a synthetic model, when it is asked for, into memory that
//! lives as long as it is sent: a file that is damaged or became shorter is refused by name. Hashes of whole experts of a
//! directory are in its manifest; others are computed, which takes about as long as reading them. Synthetic experts are hashed once and
//! remembered: a node asks for all it is to hold. Refuses experts and blocks that the model has not, by name.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use mesh_net::shelf::{Blob, NotLent, Shelf};
use mesh_wire::id::{ExpertKey, Slice};
use mesh_wire::weights::{Catalogue, Hash, Reason};
use model::format::{blocks, slice_width};
use model::open::{Model, OpenError};
use model::packed::TensorName;
use model::region::{Buffer, Bytes};

/// See the module.
#[derive(Debug)]
pub struct ModelShelf {
    model: Arc<Model>,
    /// Hashes of whole experts that had to be made for it; at most one per expert of the model.
    made: Mutex<HashMap<ExpertKey, Hash>>,
}

impl ModelShelf {
    /// Everything of this model.
    pub fn new(model: Arc<Model>) -> ModelShelf {
        ModelShelf { model, made: Mutex::default() }
    }

    fn is_whole(&self, slice: &Slice) -> bool {
        slice.from == 0 && usize::from(slice.to) == blocks(self.model.config.moe.inter)
    }

    fn hash(&self, slice: &Slice) -> Result<Hash, NotLent> {
        let key = slice.key;
        if !self.is_whole(slice) {
            return Ok(*blake3::hash(&self.part(slice)?).as_bytes());
        }
        let name = TensorName::Expert(key.layer, key.expert);
        if self.model.directory.is_some() {
            return self.model.hash(name).map_err(absent);
        }
        let known = self.made.lock().unwrap_or_else(PoisonError::into_inner).get(&key).copied();
        if let Some(hash) = known {
            return Ok(hash);
        }
        let hash = self.model.hash(name).map_err(absent)?;
        self.made.lock().unwrap_or_else(PoisonError::into_inner).insert(key, hash);
        Ok(hash)
    }

    /// The bytes of a slice.
    fn part(&self, slice: &Slice) -> Result<Bytes, NotLent> {
        let Slice { key, from, to } = *slice;
        let config = &self.model.config;
        let unknown = || {
            let (layer, expert) = (key.layer, key.expert);
            NotLent::new(
                Reason::Absent,
                format!("the model has no blocks {from}..{to} of expert {expert} in layer {layer}"),
            )
        };
        let width = slice_width(config.moe.inter, (from, to)).ok_or_else(unknown)?;
        let mut bytes = Buffer::zeroed(self.model.format.expert_bytes(config.hidden, width));
        self.model.write_slice((key.layer, key.expert), (from, to), &mut bytes).map_err(absent)?;
        Ok(bytes.into())
    }
}

fn absent(error: OpenError) -> NotLent {
    NotLent::new(Reason::Absent, error.0)
}

impl Shelf for ModelShelf {
    fn catalogue(&self) -> Option<Catalogue> {
        let (model, config) = (&self.model, &self.model.config);
        // A config beyond these widths is refused when it is read.
        let narrow = |value: usize| u32::try_from(value).ok();
        let layers = config
            .moe_layers()
            .filter_map(|layer| Some((u16::try_from(layer).ok()?, model.step_log2(layer))));
        Some(Catalogue {
            fingerprint: model.fingerprint,
            name: model.name.clone(),
            format: model.format as u8,
            hidden: narrow(config.hidden)?,
            inter: narrow(config.moe.inter)?,
            experts: u16::try_from(config.moe.experts).ok()?,
            layers: layers.collect(),
        })
    }

    fn hashes(&self, slices: &[Slice]) -> Result<Vec<Hash>, NotLent> {
        slices.iter().map(|slice| self.hash(slice)).collect()
    }

    fn open(&self, slice: Slice, _: Hash) -> Result<Box<dyn Blob>, NotLent> {
        Ok(Box::new(Opened(self.part(&slice)?)))
    }
}

/// An expert that is lent.
struct Opened(Bytes);

impl Blob for Opened {
    fn bytes(&self) -> u64 {
        self.0.len() as u64
    }

    fn read(&mut self, from: u64, out: &mut [u8]) -> std::io::Result<()> {
        let range = usize::try_from(from).ok().and_then(|from| Some(from..from.checked_add(out.len())?));
        let bytes = range.and_then(|range| self.0.get(range)).ok_or(std::io::ErrorKind::UnexpectedEof)?;
        out.copy_from_slice(bytes);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use model::format::Format;

    use super::*;

    fn shelf() -> (ModelShelf, tempfile::TempDir) {
        let cache = tempfile::tempdir().unwrap();
        let spec = "synthetic:olmoe-1b-7b?layers=1";
        let model = Model::open(spec, Format::Q4, cache.path(), &mut |_, _, _| ()).unwrap();
        (ModelShelf::new(Arc::new(model)), cache)
    }

    fn read(shelf: &ModelShelf, slice: Slice) -> Vec<u8> {
        let mut blob = shelf.open(slice, [0; 32]).unwrap();
        let mut all = vec![0; blob.bytes() as usize];
        let (first, rest) = all.split_at_mut(1000);
        blob.read(1000, rest).unwrap();
        blob.read(0, first).unwrap();
        assert!(blob.read(blob.bytes() - 9, &mut [0; 10]).is_err());
        all
    }

    #[test]
    fn whole_experts_and_slices_have_the_hashes_that_are_said() {
        let (shelf, _cache) = shelf();
        let key = ExpertKey { layer: 0, expert: 3 };
        let whole = Slice { key, from: 0, to: 8 };
        let part = Slice { key, from: 2, to: 5 };
        let hashes = shelf.hashes(&[whole, part, whole]).unwrap();
        assert_eq!(hashes[0], hashes[2]);
        for (slice, hash) in [whole, part].into_iter().zip(&hashes) {
            let bytes = read(&shelf, slice);
            assert_eq!(blake3::hash(&bytes).as_bytes(), hash);
        }
        let expected = shelf.model.expert(0, 3).unwrap();
        assert_eq!(read(&shelf, whole), &expected.bytes[..]);
        assert_eq!(read(&shelf, part), &expected.slice(2, 5).unwrap().bytes[..]);
    }

    #[test]
    fn what_the_model_has_not_is_refused_by_name() {
        let (shelf, _cache) = shelf();
        let slice = |layer, expert, from, to| Slice { key: ExpertKey { layer, expert }, from, to };
        for (wrong, name) in [
            (slice(1, 0, 0, 8), "layers.1.experts.0"),
            (slice(0, 64, 0, 8), "layers.0.experts.64"),
            (slice(0, 0, 7, 9), "blocks 7..9"),
            (slice(0, 99, 1, 2), "layers.0.experts.99"),
        ] {
            let refused = shelf.hashes(&[wrong]).unwrap_err();
            assert_eq!(refused.reason, Reason::Absent);
            assert!(refused.detail.contains(name), "{}", refused.detail);
            assert!(shelf.open(wrong, [0; 32]).is_err());
        }
    }

    #[test]
    fn the_catalogue_says_what_the_model_is() {
        let (shelf, _cache) = shelf();
        let catalogue = shelf.catalogue().unwrap();
        assert_eq!((catalogue.hidden, catalogue.inter, catalogue.experts), (2048, 1024, 64));
        assert_eq!(catalogue.layers, [(0, shelf.model.step_log2(0))]);
        assert_eq!((catalogue.fingerprint, catalogue.format), (shelf.model.fingerprint, Format::Q4 as u8));
    }
}
