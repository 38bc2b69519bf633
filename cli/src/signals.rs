//! Waiting for the user or the parent to say stop.

use std::io::Read;

/// Blocks until SIGINT or SIGTERM.
pub(crate) fn wait_for_stop() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    runtime.block_on(stop_signal())
}

/// Resolves at SIGINT or SIGTERM.
pub(crate) async fn stop_signal() -> anyhow::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

/// Resolves when standard input ends: the parent is gone or wants this process to stop.
pub(crate) async fn parent_gone() {
    let (sender, ended) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        let mut buffer = [0; 64];
        while matches!(std::io::stdin().read(&mut buffer), Ok(count) if count > 0) {}
        sender.send(()).ok();
    });
    ended.await.ok();
}

/// Resolves when this process should stop.
pub(crate) async fn stop(with_parent: bool) -> anyhow::Result<()> {
    if with_parent {
        tokio::select! {
            result = stop_signal() => result,
            () = parent_gone() => Ok(()),
        }
    } else {
        stop_signal().await
    }
}
