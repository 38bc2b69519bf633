//! Rung: pure. Opening by directory and by synthetic name.

use std::path::PathBuf;

use super::*;
use crate::packed::{expert_tensors, router_tensors};

fn tale() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tale-moe"))
}

fn open(spec: &str, format: Format, cache: &Path) -> Result<Model, OpenError> {
    Model::open(spec, format, cache, &mut |_, _, _| {})
}

#[test]
fn the_real_model_opens_in_every_format() {
    let cache = tempfile::tempdir().unwrap();
    for format in Format::ALL {
        let model = open(tale().to_str().unwrap(), format, cache.path()).unwrap();
        assert_eq!((model.name.as_str(), model.config.layers.len()), ("tale-moe", 6));
        for name in router_tensors(&model.config) {
            let expected = kind(&model.config, name).unwrap().bytes(format);
            let bytes = model.bytes(name).unwrap();
            assert_eq!(bytes.len(), expected, "{name}");
            assert_eq!(*blake3::hash(&bytes).as_bytes(), model.hash(name).unwrap(), "{name}");
        }
        for layer in 0..6 {
            assert_eq!(expert_tensors(&model.config, layer).count(), 24);
            assert!(model.expert(layer, 23).is_ok() && model.expert(layer, 24).is_err());
            assert!((-40..0).contains(&model.step_log2(layer)), "{}", model.step_log2(layer));
        }
        model.verify(&mut |_, _, _| {}).unwrap();
        let again = open(tale().to_str().unwrap(), format, cache.path()).unwrap();
        assert_eq!(again.fingerprint, model.fingerprint);
    }
}
