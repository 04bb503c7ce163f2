//! What a measurement has to say of where it was made: machine, commit, peak memory.

use std::process::Command;

use sysinfo::System;

use crate::model::kernels;

/// The processor, how many cores this process may use, and the instruction set of the kernels.
pub fn machine() -> String {
    let processor = System::new().ok().and_then(|mut system| {
        system.refresh_cpu_all();
        let brand = system.cpus().first()?.brand().trim().to_owned();
        (!brand.is_empty()).then_some(brand)
    });
    let processor = processor.unwrap_or_else(|| std::env::consts::ARCH.into());
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    format!("{processor}, {cores} cores, {}", kernels::identity())
}

/// What git says of the working directory, with `-dirty` where files differ; `unknown` without git.
pub fn commit() -> String {
    let described = Command::new("git")
        .args(["describe", "--always", "--dirty", "--abbrev=12"])
        .output();
    let described = described.ok().filter(|output| output.status.success());
    let text = described.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
    text.filter(|text| !text.is_empty())
        .unwrap_or_else(|| "unknown".into())
}

/// The most memory that this process has held so far, in bytes (VmHWM: mapped pages included);
/// `None` where the system does not say.
pub fn peak_rss() -> Option<u64> {
    peak_of(&std::fs::read_to_string("/proc/self/status").ok()?)
}

fn peak_of(status: &str) -> Option<u64> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peak_is_read_in_bytes() {
        let status = "Name:\tinwit\nVmPeak:\t  9999 kB\nVmHWM:\t  2048 kB\nVmRSS:\t 1 kB\n";
        assert_eq!(peak_of(status), Some(2 << 20));
        assert_eq!(peak_of("Name:\tinwit\n"), None);
    }

    #[test]
    fn a_machine_names_its_kernels() {
        assert!(machine().contains(kernels::identity()));
    }
}
