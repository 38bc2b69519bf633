//! Options that several commands share: which model, in which format, computed how.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use model::format::Format;
use model::kernel::Kernels;
use model::kernel::bench::autotable;
use model::kernel::native::{DEFAULT_SPIN, Native, NativeConfig};
use model::open::Model;

use crate::output::Progress;

/// Which model, and how it is computed.
#[derive(Args, Clone, Debug)]
pub(crate) struct ModelOptions {
    /// Directory of a Hugging Face checkpoint, or synthetic:SHAPE?layers=N&seed=S
    /// (shapes: qwen3-30b-a3b, qwen3-235b-a22b, mixtral-8x7b, olmoe-1b-7b). Default: the tale-moe story model
    #[arg(long, env = "MOEMESH_MODEL")]
    pub(crate) model: Option<String>,
    /// Weight format: q4 (4.5 bits per weight), q8 (8.5) or bf16 (16)
    #[arg(long, default_value = "q4")]
    pub(crate) weights: Format,
    /// exact: the same bits on every machine, batch and instruction set. fastest: whatever kernel is fastest
    /// here, equal within tolerance only
    #[arg(long, value_enum, default_value_t = Class::Exact)]
    pub(crate) kernels: Class,
    /// native: our own kernels. libtorch: its operators (not exact, implies --kernels fastest)
    #[arg(long, value_enum, default_value_t = Backend::Native)]
    pub(crate) backend: Backend,
    /// Threads to compute with, this process in all [default: one per core]
    #[arg(long, env = "MOEMESH_THREADS")]
    pub(crate) threads: Option<usize>,
    /// Where packed models are kept [default: $XDG_CACHE_HOME/moemesh or ~/.cache/moemesh]
    #[arg(long, env = "MOEMESH_CACHE")]
    pub(crate) cache: Option<PathBuf>,
}

/// A pace in GB/s: above zero.
pub(crate) fn parse_pace(text: &str) -> Result<f64, String> {
    let pace: f64 = text.parse().map_err(|_| format!("'{text}' is no number"))?;
    if pace > 0.0 && pace.is_finite() { Ok(pace) } else { Err("a pace is above 0 GB/s".to_owned()) }
}

/// Exactness class.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Class {
    Exact,
    Fastest,
}

/// Kernel backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Backend {
    Native,
    Libtorch,
}

impl ModelOptions {
    /// The model by the name it will be opened with.
    pub(crate) fn spec(&self) -> anyhow::Result<String> {
        if let Some(spec) = &self.model {
            return Ok(spec.clone());
        }
        let beside_binary = std::env::current_exe()
            .ok()
            .and_then(|exe| Some(exe.parent()?.parent()?.to_owned()))
            .into_iter()
            .flat_map(|root| [root.join("models/tale-moe"), root.join("../models/tale-moe")]);
        let here = Path::new("models/tale-moe").to_owned();
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tale-moe");
        let mut places = std::iter::once(here).chain(beside_binary).chain([source]);
        match places.find(|place| place.join("config.json").is_file()) {
            Some(place) => Ok(place.to_string_lossy().into_owned()),
            None => bail!("the demo model models/tale-moe is not here; name a model with --model DIR"),
        }
    }

    /// Where packed models are kept.
    pub(crate) fn cache_dir(&self) -> anyhow::Result<PathBuf> {
        if let Some(cache) = &self.cache {
            return Ok(cache.clone());
        }
        let home = std::env::var_os("XDG_CACHE_HOME")
            .map(PathBuf::from)
            .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")));
        Ok(home.context("neither HOME nor XDG_CACHE_HOME is set; say --cache DIR")?.join("moemesh"))
    }

    /// Opens the model, packing it first if need be, with progress on standard error.
    pub(crate) fn open(&self) -> anyhow::Result<Arc<Model>> {
        let mut progress = Progress::new();
        let mut show = |done, total, what: &str| {
            // A tensor's name alone does not say what happens to it.
            let packing = !what.contains(' ') && what != "packed";
            progress.show(done, total, &if packing { format!("packing {what}") } else { what.to_owned() });
        };
        let model = Model::open(&self.spec()?, self.weights, &self.cache_dir()?, &mut show)?;
        progress.finish();
        Ok(Arc::new(model))
    }

    /// Threads this process computes with.
    pub(crate) fn thread_count(&self) -> usize {
        self.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from)).max(1)
    }

    /// The kernels for products of this model, and the native ones for everything between them.
    pub(crate) fn load_kernels(&self, model: &Model) -> anyhow::Result<(Arc<dyn Kernels>, Arc<Native>)> {
        let mut config = NativeConfig::threads(self.thread_count());
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        // Watching for work steals the core from whoever would bring it, once there are more threads than cores.
        config.spin = if self.thread_count() <= cores { DEFAULT_SPIN } else { Duration::ZERO };
        let native = Arc::new(Native::new(config)?);
        match (self.backend, self.kernels) {
            (Backend::Libtorch, _) => Ok((self.libtorch()?, native)),
            (Backend::Native, Class::Fastest) if cfg!(feature = "torch") => {
                Ok((self.fastest(model, Arc::<Native>::clone(&native))?, native))
            }
            (Backend::Native, _) => Ok((Arc::<Native>::clone(&native), native)),
        }
    }

    /// Whether every result must be the bits of the definition.
    pub(crate) fn require_exact(&self) -> bool {
        self.kernels == Class::Exact && self.backend == Backend::Native
    }

    /// Whichever backend streams an expert of this model faster for a single row, measured now.
    fn fastest(&self, model: &Model, native: Arc<Native>) -> anyhow::Result<Arc<dyn Kernels>> {
        let shape = (model.config.hidden, model.config.moe.inter);
        let torch = self.libtorch()?;
        let speed = |kernels: &dyn Kernels| -> anyhow::Result<f64> {
            Ok(autotable(kernels, shape, model.format)?[0].weight_gb_s)
        };
        let (ours, theirs) = (speed(&*native)?, speed(&*torch)?);
        tracing::info!(native = ours, libtorch = theirs, "GB/s of weights at one row");
        Ok(if theirs > ours { torch } else { native })
    }

    #[cfg(feature = "torch")]
    fn libtorch(&self) -> anyhow::Result<Arc<dyn Kernels>> {
        use model::kernel::libtorch::{Libtorch, LibtorchConfig};
        let config = LibtorchConfig { device: "cpu".to_owned(), threads: self.thread_count() };
        Ok(Arc::new(Libtorch::new(&config)?))
    }

    #[cfg(not(feature = "torch"))]
    fn libtorch(&self) -> anyhow::Result<Arc<dyn Kernels>> {
        bail!("this build has no libtorch; build it with the feature torch")
    }

    /// The same options as arguments of a child process.
    pub(crate) fn to_arguments(&self, threads: usize) -> anyhow::Result<Vec<String>> {
        let name = |value: Option<clap::builder::PossibleValue>| value.map(|v| v.get_name().to_owned());
        Ok(vec![
            "--model".into(),
            self.spec()?,
            "--weights".into(),
            self.weights.to_string(),
            "--kernels".into(),
            name(self.kernels.to_possible_value()).unwrap_or_default(),
            "--backend".into(),
            name(self.backend.to_possible_value()).unwrap_or_default(),
            "--threads".into(),
            threads.to_string(),
            "--cache".into(),
            self.cache_dir()?.to_string_lossy().into_owned(),
        ])
    }
}
