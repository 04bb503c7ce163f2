//! Ctrl-C while a command is busy with what cannot be waited for: it ends at once and leaves
//! nothing behind.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// Asks again and again until there is an answer.
fn wait_for<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    for _ in 0..6000 {
        if let Some(answer) = ask() {
            return answer;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    panic!("{what}: not within half a minute");
}

/// Whether a process runs; one that has ended may still wait for somebody to take note.
fn runs(pid: &str) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/stat"));
    status.is_ok_and(|line| !line.contains(") Z "))
}

#[test]
fn an_interrupted_fetch_ends_at_once_and_takes_its_helper_along() {
    let folder = TempDir::new().unwrap();
    let inside = |name: &str| folder.path().join(name);
    let pid_file = inside("pid");
    // Stands for a pip that downloads for ever.
    let python = format!(
        "#!/bin/sh\necho $$ > {}\nexec sleep 600\n",
        pid_file.display()
    );
    fs::write(inside("python3"), python).unwrap();
    fs::set_permissions(inside("python3"), fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(inside("data.jsonl"), "{\"text\": \"Hi\"}\n").unwrap();
    let path = std::env::var("PATH").unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_inwit"))
        .args(["score", "--model", "gemma3-270m", "--out"])
        .arg(inside("out.jsonl"))
        .arg("--data")
        .arg(inside("data.jsonl"))
        .env("PATH", format!("{}:{path}", folder.path().display()))
        .env("INWIT_CACHE", inside("cache"))
        .env("HF_HUB_OFFLINE", "1")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let helper = wait_for("the helper", || {
        let pid = fs::read_to_string(&pid_file).ok()?;
        pid.ends_with('\n').then(|| pid.trim().to_owned())
    });
    assert!(runs(&helper));
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    let status = wait_for("the end", || child.try_wait().unwrap());
    assert_eq!(status.code(), Some(130));
    wait_for("the helper's end", || (!runs(&helper)).then_some(()));
    let left = |folder: &Path| fs::read_dir(folder).unwrap().count();
    // The lock file alone.
    assert_eq!(left(&inside("cache/models")), 1);
    assert!(!inside("out.jsonl").exists());
}
