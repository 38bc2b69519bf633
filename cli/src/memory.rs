//! How much memory this machine has, and how much of it is free to be taken.

/// Bytes of memory the machine has; `None` where it does not say.
pub(crate) fn total() -> Option<u64> {
    meminfo("MemTotal:")
}

/// Bytes that can be taken without anything else being pushed out, inside the limit of the control group if there is
/// one; `None` where the system does not say.
pub(crate) fn available() -> Option<u64> {
    let machine = meminfo("MemAvailable:")?;
    let number = |path: &str| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let (limit, used) = (number("/sys/fs/cgroup/memory.max"), number("/sys/fs/cgroup/memory.current"));
    let group = limit.zip(used).map(|(limit, used)| limit.saturating_sub(used));
    Some(group.map_or(machine, |group| group.min(machine)))
}

fn meminfo(key: &str) -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|line| line.starts_with(key))?;
    let kilobytes: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kilobytes * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_is_available_than_there_is() {
        if let (Some(total), Some(available)) = (total(), available()) {
            assert!(0 < available && available <= total);
        }
    }
}
