//! The tile unit of AMX, emulated: so that the machine code of the AMX kernels runs on machines without it.
//!
//! Idea: there each tile instruction raises SIGILL; a signal handler decodes the bytes it points at, does what
//! Intel's manual (volume 2, "Intel AMX instruction set reference") says, with one unit per thread, and goes on
//! behind the instruction and any that follow directly. It knows exactly the instructions of `amx` and `amx_tiles`;
//! any other takes the default action, death. What the manual calls a fault (an unconfigured tile, shapes that do not
//! fit, a configuration with reserved bits) ends the process with its name: the real unit would do no less. Price:
//! a few microseconds per signal. It says nothing about time, nor about whether Linux grants the unit.

#![allow(
    unsafe_code,
    reason = "a signal handler that reads code and works on memory as its instructions say"
)]

use std::cell::{Cell, UnsafeCell};
use std::mem::MaybeUninit;
use std::sync::Once;

/// Bytes per tile row, rows per tile, tiles: palette 1.
const ROW: usize = 64;
const ROWS: usize = 16;
const TILES: usize = 8;

thread_local! {
    static UNIT: UnsafeCell<Unit> = const { UnsafeCell::new(Unit::new()) };
    static DONE: Cell<Done> = const { Cell::new(Done { multiplications: 0, loaded: 0, stored: 0 }) };
}

/// What the units of a thread have done so far.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Done {
    pub(super) multiplications: usize,
    /// Bytes loaded into tiles and stored from them.
    pub(super) loaded: usize,
    pub(super) stored: usize,
}

/// What was emulated while `job` ran, in this thread.
pub(super) fn done_by(job: impl FnOnce()) -> Done {
    let before = DONE.get();
    job();
    let after = DONE.get();
    Done {
        multiplications: after.multiplications - before.multiplications,
        loaded: after.loaded - before.loaded,
        stored: after.stored - before.stored,
    }
}

/// Counts in a `Done`.
fn count(change: impl FnOnce(&mut Done)) {
    let mut done = DONE.get();
    change(&mut done);
    DONE.set(done);
}

/// Whether the emulated unit of this thread is configured.
pub(super) fn configured() -> bool {
    // SAFETY: the handler, which alone changes the unit, does not run meanwhile: this raises no signal.
    UNIT.with(|unit| unsafe { (*unit.get()).shapes.iter().any(|(rows, _)| *rows > 0) })
}

/// Why an instruction was not done.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Trap {
    /// Not one of the instructions that are emulated here.
    Unknown,
    /// One that the manual forbids.
    Fault(&'static str),
}

use Trap::{Fault, Unknown};

/// The tile unit of a thread.
pub(super) struct Unit {
    /// Rows and bytes per row of each tile; (0, 0): not configured.
    shapes: [(usize, usize); TILES],
    tiles: [[[u8; ROW]; ROWS]; TILES],
}

/// Registers of a thread as the instructions number them.
pub(super) type Registers = [u64; 16];

/// An instruction in VEX coding, map 0F38, W = 0, L = 0.
struct Instruction {
    opcode: u8,
    /// Mandatory prefix: 0 none, 1 is 66, 2 is F3, 3 is F2.
    prefix: u8,
    /// Second source register.
    vvvv: usize,
    reg: usize,
    /// Register operand, or the memory operand.
    operand: Operand,
    len: usize,
}

enum Operand {
    Register(usize),
    /// Address and, with a SIB byte, the value of the index register times its scale.
    Memory(u64, Option<u64>),
}

/// Bytes of code, read one after the other.
struct Code {
    at: *const u8,
    len: usize,
}

impl Code {
    /// # Safety
    /// The bytes of an instruction must be readable.
    unsafe fn byte(&mut self) -> u8 {
        // SAFETY: by the contract: an instruction's length follows from its bytes so far.
        let byte = unsafe { self.at.add(self.len).read() };
        self.len += 1;
        byte
    }
}

/// # Safety
/// `at` must point at an instruction.
unsafe fn decode(at: *const u8, registers: &Registers) -> Result<Instruction, Trap> {
    let mut code = Code { at, len: 0 };
    // SAFETY: by the contract, here and below.
    let mut byte = || unsafe { code.byte() };
    if byte() != 0xc4 {
        return Err(Unknown);
    }
    let (first, second) = (byte(), byte());
    // The bits R, X and B, inverted, extend register numbers; tiles have no register 8.
    let (r, x, b) = (!first >> 7 & 1, !first >> 6 & 1, !first >> 5 & 1);
    if first & 0x1f != 2 || second & 0x84 != 0 || r != 0 {
        return Err(Unknown);
    }
    let (opcode, modrm) = (byte(), byte());
    let (mode, rm) = (modrm >> 6, modrm & 7);
    let operand = if mode == 3 {
        Operand::Register(usize::from(rm))
    } else {
        let (mut base, mut stride) = (rm, None);
        if rm == 4 {
            let sib = byte();
            base = sib & 7;
            let index = sib >> 3 & 7 | x << 3;
            stride = Some(if index == 4 { 0 } else { registers[usize::from(index)] << (sib >> 6) });
        }
        if mode == 0 && base == 5 {
            return Err(Unknown); // relative to the instruction, or no base: never emitted
        }
        let displacement = match mode {
            0 => 0,
            1 => i64::from(byte() as i8),
            _ => i64::from(i32::from_le_bytes([byte(), byte(), byte(), byte()])),
        };
        let address = registers[usize::from(base | b << 3)].wrapping_add_signed(displacement);
        Operand::Memory(address, stride)
    };
    Ok(Instruction {
        opcode,
        prefix: second & 3,
        vvvv: usize::from(!second >> 3 & 15),
        reg: usize::from(modrm >> 3 & 7),
        operand,
        len: code.len,
    })
}

impl Unit {
    pub(super) const fn new() -> Unit {
        Unit { shapes: [(0, 0); TILES], tiles: [[[0; ROW]; ROWS]; TILES] }
    }

    /// Does the instruction at `at`; how long it is.
    ///
    /// # Safety
    /// `at` must point at an instruction, whose memory operands must be valid for it.
    pub(super) unsafe fn step(&mut self, at: *const u8, registers: &Registers) -> Result<usize, Trap> {
        // SAFETY: by the contract of this function.
        let i = unsafe { decode(at, registers)? };
        match (i.opcode, i.prefix, &i.operand) {
            (0x49, 0, Operand::Memory(address, _)) if i.reg == 0 => {
                // SAFETY: as above.
                unsafe { self.configure(*address)? }
            }
            (0x49, 0, Operand::Register(0)) if i.reg == 0 => *self = Unit::new(),
            (0x49, 3, Operand::Register(0)) => {
                self.shape(i.reg)?;
                self.tiles[i.reg] = [[0; ROW]; ROWS];
            }
            (0x4b, 3, Operand::Memory(address, Some(stride))) => {
                // SAFETY: as above.
                unsafe { self.load(i.reg, *address, *stride)? }
            }
            (0x4b, 2, Operand::Memory(address, Some(stride))) => {
                // SAFETY: as above.
                unsafe { self.store(i.reg, *address, *stride)? }
            }
            // tdpbssd, tdpbsud, tdpbusd, tdpbuud: which of the sources has signed bytes.
            (0x5e, prefix, Operand::Register(rm)) => {
                let signed = [(false, false), (false, true), (true, false), (true, true)];
                self.multiply(i.reg, (*rm, i.vvvv), signed[usize::from(prefix)])?;
                count(|done| done.multiplications += 1);
            }
            _ => return Err(Unknown),
        }
        Ok(i.len)
    }

    /// Rows and bytes per row of a configured tile.
    fn shape(&self, tile: usize) -> Result<(usize, usize), Trap> {
        match self.shapes.get(tile) {
            Some(&(rows, bytes)) if rows > 0 => Ok((rows, bytes)),
            _ => Err(Fault("a tile is used that is not configured")),
        }
    }

    unsafe fn configure(&mut self, address: u64) -> Result<(), Trap> {
        // SAFETY: by the contract of `step`.
        let bytes = unsafe { (address as *const [u8; 64]).read_unaligned() };
        *self = Unit::new();
        if bytes[0] == 0 {
            return Ok(());
        }
        let reserved = bytes[2..16].iter().chain(&bytes[32..48]).chain(&bytes[56..]);
        if bytes[0] != 1 || bytes[1] != 0 || reserved.into_iter().any(|b| *b != 0) {
            return Err(Fault("a configuration with another palette, a start row or reserved bytes"));
        }
        for tile in 0..TILES {
            let row = usize::from(u16::from_le_bytes([bytes[16 + 2 * tile], bytes[17 + 2 * tile]]));
            let rows = usize::from(bytes[48 + tile]);
            if row > ROW || rows > ROWS || (row == 0) != (rows == 0) {
                return Err(Fault("a configuration with a tile that does not exist"));
            }
            self.shapes[tile] = (rows, row);
        }
        Ok(())
    }

    unsafe fn load(&mut self, tile: usize, address: u64, stride: u64) -> Result<(), Trap> {
        let (rows, bytes) = self.shape(tile)?;
        self.tiles[tile] = [[0; ROW]; ROWS];
        count(|done| done.loaded += rows * bytes);
        for row in 0..rows {
            let from = address.wrapping_add(stride.wrapping_mul(row as u64)) as *const u8;
            // SAFETY: by the contract of `step`.
            unsafe { from.copy_to_nonoverlapping(self.tiles[tile][row].as_mut_ptr(), bytes) };
        }
        Ok(())
    }

    unsafe fn store(&self, tile: usize, address: u64, stride: u64) -> Result<(), Trap> {
        let (rows, bytes) = self.shape(tile)?;
        count(|done| done.stored += rows * bytes);
        for row in 0..rows {
            let to = address.wrapping_add(stride.wrapping_mul(row as u64)) as *mut u8;
            // SAFETY: by the contract of `step`.
            unsafe { to.copy_from_nonoverlapping(self.tiles[tile][row].as_ptr(), bytes) };
        }
        Ok(())
    }

    /// `to[m][n] += sum over k and i < 4 of a[m][4k + i] * b[k][4n + i]`, in i32.
    fn multiply(&mut self, to: usize, (a, b): (usize, usize), signed: (bool, bool)) -> Result<(), Trap> {
        let (shape, left, right) = (self.shape(to)?, self.shape(a)?, self.shape(b)?);
        if to == a || to == b || a == b {
            return Err(Fault("a multiplication that names a tile twice"));
        }
        if [shape, left, right].iter().any(|(_, bytes)| !bytes.is_multiple_of(4)) {
            return Err(Fault("a multiplication of rows that are not whole quads"));
        }
        if shape.0 != left.0 || left.1 / 4 != right.0 || shape.1 != right.1 {
            return Err(Fault("a multiplication of tiles whose shapes do not fit"));
        }
        let widen = |byte: u8, signed: bool| if signed { i32::from(byte as i8) } else { i32::from(byte) };
        let mut out = [[0; ROW]; ROWS];
        for m in 0..shape.0 {
            for n in 0..shape.1 / 4 {
                let at = 4 * n..4 * n + 4;
                let mut sum = i32::from_le_bytes(self.tiles[to][m][at.clone()].try_into().unwrap_or([0; 4]));
                for k in 0..left.1 / 4 {
                    for i in 0..4 {
                        let left = widen(self.tiles[a][m][4 * k + i], signed.0);
                        let right = widen(self.tiles[b][k][4 * n + i], signed.1);
                        sum = sum.wrapping_add(left * right);
                    }
                }
                out[m][at].copy_from_slice(&sum.to_le_bytes());
            }
        }
        self.tiles[to] = out;
        Ok(())
    }
}

/// From now on tile instructions are emulated, in every thread of the process. For machines that lack them.
pub(super) fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: all zero is a valid sigaction, and the handler has the signature of SA_SIGINFO.
        let done = unsafe {
            let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
            action.sa_sigaction = on_illegal_instruction as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO;
            libc::sigaction(libc::SIGILL, &action, std::ptr::null_mut())
        };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
    });
}

/// Numbers of the general registers in a signal frame, in the order of instruction coding.
const FRAME: [libc::c_int; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

/// Runs in the thread that met the instruction, between two of its instructions: so the unit is nobody else's.
extern "C" fn on_illegal_instruction(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the system hands a SA_SIGINFO handler the frame of the interrupted code.
    let frame = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let mut registers = [0; 16];
    for (register, at) in registers.iter_mut().zip(FRAME) {
        *register = frame[at as usize] as u64;
    }
    let start = frame[libc::REG_RIP as usize];
    let mut at = start;
    // Tile instructions come in runs: one signal serves a whole run, whose registers do not change.
    let stop = UNIT.with(|unit| {
        loop {
            // SAFETY: the processor was about to run what lies at `start`, and then what lies behind it; nothing in
            // the handler raises the signal again.
            match unsafe { (*unit.get()).step(at as *const u8, &registers) } {
                Ok(len) => at += len as i64,
                Err(stop) => break stop,
            }
        }
    });
    frame[libc::REG_RIP as usize] = at;
    match stop {
        Unknown if at > start => (),
        Unknown => {
            // Back to the instruction, this time to die of it.
            // SAFETY: changes the action of one signal.
            unsafe { libc::signal(libc::SIGILL, libc::SIG_DFL) };
        }
        Fault(what) => {
            // SAFETY: writes bytes that exist, then ends the process: both may be done in a handler.
            unsafe {
                libc::write(2, what.as_ptr().cast(), what.len());
                libc::abort();
            }
        }
    }
}
