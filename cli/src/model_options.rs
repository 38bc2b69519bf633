//! Options that several commands share: which model, in which format, computed how and where.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail};
use clap::builder::{RangedU64ValueParser, TypedValueParser};
use clap::{Args, ValueEnum};
use model::format::Format;
use model::kernel::Kernels;
#[cfg(feature = "torch")]
use model::kernel::fastest::{Fastest, Workload};
#[cfg(feature = "torch")]
use model::kernel::libtorch::{Libtorch, LibtorchConfig, Route};
use model::kernel::native::{Isa, Native, NativeConfig};
use model::open::Model;

use crate::output::Progress;

/// The device that needs no GPU.
const CPU: &str = "cpu";

/// Threads of one process at most: more than any machine has; a typo is caught.
const THREADS_MAX: u64 = 1024;

/// Reads a number of threads.
pub(crate) fn threads() -> impl TypedValueParser<Value = usize> {
    RangedU64ValueParser::<usize>::new().range(1..=THREADS_MAX)
}

/// Cores this process may use; 1 where the system does not say.
fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Tells whoever asked for more threads than there are cores.
pub(crate) fn warn_if_crowded(threads: usize) {
    let cores = cores();
    if threads > cores {
        tracing::warn!(
            "{threads} threads on {cores} cores only wait for each other: say --threads {cores} or leave it out"
        );
    }
}

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
    /// Where libtorch multiplies: cpu, cuda, cuda:N or mps; any but cpu needs --kernels fastest or --backend libtorch.
    /// What lies between products (attention, norms, gates) stays on the CPU
    #[arg(long, default_value = CPU)]
    pub(crate) device: String,
    /// Threads to compute with, this process in all [default: one per core]
    #[arg(long, env = "MOEMESH_THREADS", value_parser = threads())]
    pub(crate) threads: Option<usize>,
    /// Where packed models are kept [default: $XDG_CACHE_HOME/moemesh or ~/.cache/moemesh]
    #[arg(long, env = "MOEMESH_CACHE")]
    pub(crate) cache: Option<PathBuf>,
}

/// Refuses a choice of instructions (`MOEMESH_ISA`) that this machine has not.
pub(crate) fn check_isa() -> anyhow::Result<()> {
    Isa::chosen().map_err(anyhow::Error::msg)?;
    Ok(())
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
        // Before minutes of packing.
        check_isa()?;
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
        self.threads.unwrap_or_else(cores).max(1)
    }

    /// The kernels for products of this model, and the native ones for everything between them.
    pub(crate) fn load_kernels(&self, model: &Model) -> anyhow::Result<(Arc<dyn Kernels>, Arc<Native>)> {
        self.load_kernels_for(Products::of(model))
    }

    /// The same for a model of which only the sizes are known.
    pub(crate) fn load_kernels_for(
        &self,
        products: Products,
    ) -> anyhow::Result<(Arc<dyn Kernels>, Arc<Native>)> {
        if self.device != CPU && self.require_exact() {
            bail!(
                "--device {} is for libtorch, and exact kernels run on the CPU only: add --kernels fastest (or \
                 --backend libtorch), or leave --device out",
                self.device
            );
        }
        let threads = self.thread_count();
        warn_if_crowded(threads);
        let native = Arc::new(Native::new(NativeConfig::threads(threads))?);
        let kernels: Arc<dyn Kernels> = match (self.backend, self.kernels) {
            (Backend::Native, Class::Exact) => Arc::<Native>::clone(&native),
            (Backend::Native, Class::Fastest) => self.fastest(products, &native)?,
            (Backend::Libtorch, _) => self.libtorch(products, &native)?,
        };
        tracing::info!(exact = kernels.exact(), "kernels: {} {}", kernels.name(), kernels.isa());
        Ok((kernels, native))
    }

    /// Whether every result must be the bits of the definition.
    pub(crate) fn require_exact(&self) -> bool {
        self.kernels == Class::Exact && self.backend == Backend::Native
    }

    /// Native and libtorch, each where it is faster, measured now.
    #[cfg(feature = "torch")]
    fn fastest(&self, products: Products, native: &Arc<Native>) -> anyhow::Result<Arc<dyn Kernels>> {
        let mut candidates: Vec<Arc<dyn Kernels>> = vec![Arc::<Native>::clone(native)];
        candidates.extend(libtorch_backends(&self.device, products.format, native)?);
        Ok(Arc::new(Fastest::measure("fastest", candidates, products.workload())?))
    }

    #[cfg(feature = "torch")]
    fn libtorch(&self, products: Products, native: &Arc<Native>) -> anyhow::Result<Arc<dyn Kernels>> {
        let mut candidates = libtorch_backends(&self.device, products.format, native)?;
        match candidates.len() {
            1 => Ok(candidates.swap_remove(0)),
            _ => Ok(Arc::new(Fastest::measure("libtorch", candidates, products.workload())?)),
        }
    }

    #[cfg(not(feature = "torch"))]
    fn fastest(&self, _: Products, native: &Arc<Native>) -> anyhow::Result<Arc<dyn Kernels>> {
        self.need_cpu()?;
        tracing::warn!(
            "this build has no libtorch: --kernels fastest is our own kernels, as --kernels exact is"
        );
        Ok(Arc::<Native>::clone(native))
    }

    #[cfg(not(feature = "torch"))]
    fn libtorch(&self, _: Products, _: &Arc<Native>) -> anyhow::Result<Arc<dyn Kernels>> {
        bail!("--backend libtorch: this build has none; use the build with libtorch, or leave --backend out")
    }

    #[cfg(not(feature = "torch"))]
    fn need_cpu(&self) -> anyhow::Result<()> {
        if self.device == CPU {
            return Ok(());
        }
        bail!("--device {}: this build has no libtorch; use the build with it, or --device cpu", self.device)
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
            "--device".into(),
            self.device.clone(),
            "--threads".into(),
            threads.to_string(),
            "--cache".into(),
            self.cache_dir()?.to_string_lossy().into_owned(),
        ])
    }
}

/// Sizes of what a model multiplies by, by which kernels are chosen.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(feature = "torch"), allow(dead_code, reason = "there is nothing to choose between"))]
pub(crate) struct Products {
    /// Format of the weights.
    pub(crate) format: Format,
    /// Width of a row and of an expert.
    pub(crate) expert: (usize, usize),
    /// Outputs and inputs of a matrix that is no expert's.
    pub(crate) matrix: (usize, usize),
}

impl Products {
    /// What the model asks of its kernels: its experts, and the stacked projections of its first layer.
    fn of(model: &Model) -> Products {
        let config = &model.config;
        Products {
            format: model.format,
            expert: (config.hidden, config.moe.inter),
            matrix: (config.q_width() + 2 * config.kv_width(), config.hidden),
        }
    }

    #[cfg(feature = "torch")]
    fn workload(self) -> Workload {
        let Products { format, expert, matrix } = self;
        Workload { format, expert, matrix }
    }
}

/// libtorch's ways of multiplying on `device`: on the CPU its operators, which copy weights into their own layout, and
/// bf16 products of what is packed.
#[cfg(feature = "torch")]
pub(crate) fn libtorch_backends(
    device: &str,
    format: Format,
    native: &Arc<Native>,
) -> anyhow::Result<Vec<Arc<dyn Kernels>>> {
    let several = device == CPU && format.is_quantized();
    let routes: &[Route] =
        if several { &[Route::Operators, Route::Dequantized] } else { &[Route::Operators] };
    let open = |route: &Route| -> anyhow::Result<Arc<dyn Kernels>> {
        let crew = Some(Arc::clone(native));
        let (device, threads) = (device.to_owned(), native.threads());
        let config = LibtorchConfig { device, threads, route: *route, crew, memory_bytes: None };
        Ok(Arc::new(Libtorch::new(&config)?))
    };
    routes.iter().map(open).collect()
}
