//! Threads that share one product at a time, and wait for the next without sleeping.
//! A forward pass hands out a piece of work every few microseconds: waking a sleeping thread would
//! cost more than the work. Between passes the threads sleep, so that an idle server is idle.

use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

/// How often a waiting thread looks before it sleeps: some 50 to 100 microseconds.
const LOOKS: usize = 4_000;

thread_local! {
    static CURRENT: RefCell<Option<Arc<Shared>>> = const { RefCell::new(None) };
    /// What the next long job takes along as one more piece.
    static BESIDE: Cell<Option<Aside>> = const { Cell::new(None) };
}

type Aside = &'static (dyn Fn() + Sync);

/// Compute threads; the thread that calls is one of them.
pub struct ComputePool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

struct Shared {
    threads: usize,
    /// Odd while a job is open; a new number for each job.
    epoch: AtomicUsize,
    /// The open job. Written only while it is closed and nobody is inside.
    job: Mutex<Option<Job>>,
    /// Workers that may be reading the job.
    inside: AtomicUsize,
    /// Each thread's own pieces of the open job. Written like `job`.
    shares: Vec<Share>,
    panicked: AtomicBool,
    closing: AtomicBool,
    sleepers: AtomicUsize,
    bed: Mutex<()>,
    bell: Condvar,
}

/// Pieces that lie side by side. Their owner takes them from the first on, so that it can fetch
/// what comes next; others take from the last.
/// On lines of its own: each thread counts here at every piece, and seldom where another does.
#[derive(Default)]
#[repr(align(128))]
struct Share {
    first: AtomicUsize,
    pieces: AtomicU64,
    /// How many were taken from the front, and from the back times 2^32. A thread that finds none
    /// left has counted itself, too.
    taken: AtomicU64,
}

const FROM_FRONT: u64 = 1;
const FROM_BACK: u64 = 1 << 32;

impl Share {
    fn hand_out(&self, pieces: Range<usize>) {
        self.first.store(pieces.start, Ordering::Relaxed);
        self.pieces.store(pieces.len() as u64, Ordering::Relaxed);
        self.taken.store(0, Ordering::Relaxed);
    }

    /// A piece that nobody else takes.
    fn take(&self, from: u64) -> Option<usize> {
        let taken = self.taken.fetch_add(from, Ordering::Relaxed);
        let (front, back) = (taken % FROM_BACK, taken / FROM_BACK);
        let pieces = self.pieces.load(Ordering::Relaxed);
        let place = match from {
            _ if front + back >= pieces => return None,
            FROM_FRONT => front,
            _ => pieces - 1 - back,
        };
        Some(self.first.load(Ordering::Relaxed) + place as usize)
    }
}

/// A borrowed closure whose lifetime the caller of `parallel` guards: it does not return while a
/// worker is inside.
#[derive(Clone, Copy)]
struct Job {
    work: *const (dyn Fn(usize) + Sync),
}

// SAFETY: the closure is `Sync`, and `parallel` keeps it alive while any worker is inside.
#[allow(unsafe_code)]
unsafe impl Send for Job {}

impl ComputePool {
    /// `threads` in all, the caller's included; 0 takes one per core.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn new(threads: usize) -> std::io::Result<Self> {
        let threads = match threads {
            0 => std::thread::available_parallelism()?.get(),
            threads => threads,
        };
        let shared = Arc::new(Shared {
            threads,
            epoch: AtomicUsize::new(0),
            job: Mutex::new(None),
            inside: AtomicUsize::new(0),
            shares: (0..threads).map(|_| Share::default()).collect(),
            panicked: AtomicBool::new(false),
            closing: AtomicBool::new(false),
            sleepers: AtomicUsize::new(0),
            bed: Mutex::new(()),
            bell: Condvar::new(),
        });
        let mut pool = Self {
            shared,
            workers: Vec::new(),
        };
        for number in 1..threads {
            let shared = Arc::clone(&pool.shared);
            let worker = std::thread::Builder::new()
                .name(format!("inwit-compute-{number}"))
                .spawn(move || shared.work(number))?;
            pool.workers.push(worker);
        }
        Ok(pool)
    }

    /// Runs `f` on this thread; what it calls `parallel` for is shared by the pool.
    pub fn install<T>(&self, f: impl FnOnce() -> T) -> T {
        struct Restore(Option<Arc<Shared>>);
        impl Drop for Restore {
            fn drop(&mut self) {
                let before = self.0.take();
                CURRENT.with(|current| *current.borrow_mut() = before);
            }
        }
        let shared = Arc::clone(&self.shared);
        let _restore = Restore(CURRENT.with(|current| current.replace(Some(shared))));
        f()
    }
}

impl Drop for ComputePool {
    fn drop(&mut self) {
        self.shared.closing.store(true, Ordering::SeqCst);
        self.shared.ring();
        for worker in self.workers.drain(..) {
            // A worker catches what its work throws.
            let _ = worker.join();
        }
    }
}

/// Threads that `parallel` would use here.
pub fn current_threads() -> usize {
    CURRENT.with(|current| current.borrow().as_ref().map_or(1, |shared| shared.threads))
}

/// In how many pieces the panels of a product of so many rows are shared: enough to balance, few
/// enough to hand out cheaply, so that each takes some microseconds. A language-model head has so
/// many panels that a piece of it is small all the same, and evens out what runs beside it.
pub(super) fn pieces_of(panels: usize, rows: usize) -> usize {
    let to_balance = current_threads() * 8 * rows.div_ceil(4);
    to_balance.max(panels / 16).min(panels).max(1)
}

/// Calls `work` with each of `0..pieces` once, on the threads of the installed pool, else here.
///
/// # Panics
/// When a piece does, after the others have ended.
pub fn parallel(pieces: usize, work: impl Fn(usize) + Sync) {
    parallel_shares(pieces, |thread, threads| thread * pieces / threads, work);
}

/// The same where pieces are of different sizes: thread `t` of `n` begins with piece `first(t, n)`,
/// `first(n, n)` being `pieces`, and goes on to where the next one began.
///
/// # Panics
/// When a piece does, after the others have ended.
pub(super) fn parallel_shares(
    pieces: usize,
    first: impl Fn(usize, usize) -> usize,
    work: impl Fn(usize) + Sync,
) {
    // Taken out for the time: a piece that calls `parallel` itself runs that alone.
    let shared = CURRENT.with(|current| current.borrow_mut().take());
    match &shared {
        Some(shared) if shared.threads > 1 && pieces > 1 => {
            let result = catch_unwind(AssertUnwindSafe(|| shared.share(first, &work)));
            CURRENT.with(|current| *current.borrow_mut() = Some(Arc::clone(shared)));
            if let Err(panic) = result {
                std::panic::resume_unwind(panic);
            }
        }
        _ => {
            CURRENT.with(|current| *current.borrow_mut() = shared.clone());
            (0..pieces).for_each(work);
        }
    }
}

/// The same for a job that is long enough to take along what runs `beside` it.
pub(super) fn parallel_long(pieces: usize, work: impl Fn(usize) + Sync) {
    match BESIDE.take() {
        None => parallel(pieces, work),
        // First, so that the others can even out how long it takes.
        Some(aside) => parallel(pieces + 1, |piece| match piece.checked_sub(1) {
            None => aside(),
            Some(piece) => work(piece),
        }),
    }
}

/// Runs `main` here and `aside` once: as one more piece of the first long job in `main`, on whichever
/// thread gets to it, or after `main` where it has none. Both are over when this returns.
///
/// # Panics
/// When either does.
pub fn beside<T>(aside: impl FnOnce() + Send, main: impl FnOnce() -> T) -> T {
    let aside = Mutex::new(Some(aside));
    let run = || {
        let aside = aside.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(aside) = aside {
            aside();
        }
    };
    let shared: &(dyn Fn() + Sync) = &run;
    // SAFETY: only the lifetime is erased. Whoever takes it out is done with it inside `main`, and
    // what nobody took is taken back before this function is left.
    #[allow(unsafe_code)]
    let shared =
        unsafe { std::mem::transmute::<&(dyn Fn() + Sync), &'static (dyn Fn() + Sync)>(shared) };
    struct TakeBack(Option<Aside>);
    impl Drop for TakeBack {
        fn drop(&mut self) {
            BESIDE.set(self.0);
        }
    }
    let result = {
        let _before = TakeBack(BESIDE.replace(Some(shared)));
        main()
    };
    run();
    result
}

/// Numbers below which rows are worked on by the caller alone.
const PARALLEL_NUMBERS: usize = 1 << 14;

/// Hands the rows of `out`, `width` numbers each, to `work`: some at a time with the index of the
/// first, shared by the pool where there are many.
pub fn fill_rows(out: &mut [f32], width: usize, work: impl Fn(usize, &mut [f32]) + Sync) {
    let rows = out.len() / width;
    if out.len() < PARALLEL_NUMBERS {
        return work(0, out);
    }
    let pieces = (current_threads() * 4).min(rows);
    let base = super::SharedOut(out.as_mut_ptr());
    parallel(pieces, |piece| {
        let base = &base;
        let (first, end) = (piece * rows / pieces, (piece + 1) * rows / pieces);
        // SAFETY: inside `out`, and each row belongs to one piece.
        #[allow(unsafe_code)]
        let out = unsafe {
            std::slice::from_raw_parts_mut(base.0.add(first * width), (end - first) * width)
        };
        work(first, out);
    });
}

/// `rows` new rows of `width` numbers. `work` gets some of them at a time, as zeros, with the index
/// of the first; the pool shares them where there are many.
pub fn new_rows(rows: usize, width: usize, work: impl Fn(usize, &mut [f32]) + Sync) -> Vec<f32> {
    if rows * width < PARALLEL_NUMBERS {
        let mut out = vec![0f32; rows * width];
        work(0, &mut out);
        return out;
    }
    let pieces = (current_threads() * 4).min(rows);
    new_rows_in_pieces(rows, width, rows.div_ceil(pieces), work)
}

/// The same in pieces of `piece_rows` rows.
pub fn new_rows_in_pieces(
    rows: usize,
    width: usize,
    piece_rows: usize,
    work: impl Fn(usize, &mut [f32]) + Sync,
) -> Vec<f32> {
    let mut out: Vec<f32> = Vec::with_capacity(rows * width);
    let base = super::SharedOut(out.as_mut_ptr());
    parallel(rows.div_ceil(piece_rows), |piece| {
        let base = &base;
        let first = piece * piece_rows;
        let count = piece_rows.min(rows - first) * width;
        // SAFETY: inside the capacity, each number belongs to one piece, and zeros are numbers.
        // Whoever works on a piece writes the zeros, so that they are near him.
        #[allow(unsafe_code)]
        let out = unsafe {
            let start = base.0.add(first * width);
            std::ptr::write_bytes(start, 0, count);
            std::slice::from_raw_parts_mut(start, count)
        };
        work(first, out);
    });
    // SAFETY: every piece was written; a panic in one has left this function.
    #[allow(unsafe_code)]
    unsafe {
        out.set_len(rows * width);
    }
    out
}

/// Between two looks: a moment, and from some looks on whoever else wants this core goes first.
fn look_away(looks: &mut usize) {
    *looks += 1;
    if looks.is_multiple_of(256) {
        std::thread::yield_now();
    } else {
        std::hint::spin_loop();
    }
}

impl Shared {
    fn share(&self, first: impl Fn(usize, usize) -> usize, work: &(dyn Fn(usize) + Sync)) {
        // SAFETY: only the lifetime is erased. The job is taken back, and every worker has left,
        // before this function returns.
        #[allow(unsafe_code)]
        let work = unsafe {
            std::mem::transmute::<&(dyn Fn(usize) + Sync), &'static (dyn Fn(usize) + Sync)>(work)
        };
        let job = Job {
            work: std::ptr::from_ref(work),
        };
        *self.job.lock().unwrap_or_else(PoisonError::into_inner) = Some(job);
        for (thread, share) in self.shares.iter().enumerate() {
            share.hand_out(first(thread, self.threads)..first(thread + 1, self.threads));
        }
        self.epoch.fetch_add(1, Ordering::SeqCst);
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            self.ring();
        }
        self.take_pieces(job, 0);
        self.epoch.fetch_add(1, Ordering::SeqCst);
        let mut looks = 0;
        while self.inside.load(Ordering::SeqCst) > 0 {
            look_away(&mut looks);
        }
        *self.job.lock().unwrap_or_else(PoisonError::into_inner) = None;
        if self.panicked.swap(false, Ordering::SeqCst) {
            panic!("a piece of a computation panicked");
        }
    }

    /// First this thread's own, then what the others have not come to.
    fn take_pieces(&self, job: Job, thread: usize) {
        for owner in (thread..self.threads).chain(0..thread) {
            let from = if owner == thread {
                FROM_FRONT
            } else {
                FROM_BACK
            };
            while let Some(piece) = self.shares[owner].take(from) {
                // SAFETY: the job is open or this thread is inside it, so the closure is alive.
                #[allow(unsafe_code)]
                let work = unsafe { &*job.work };
                if catch_unwind(AssertUnwindSafe(|| work(piece))).is_err() {
                    self.panicked.store(true, Ordering::SeqCst);
                }
            }
        }
    }

    fn work(&self, thread: usize) {
        let mut done = 0;
        loop {
            let epoch = self.await_job(done);
            if self.closing.load(Ordering::SeqCst) {
                return;
            }
            // Announce, then look again: either this sees that the job was closed meanwhile, or
            // the closer sees this and waits.
            self.inside.fetch_add(1, Ordering::SeqCst);
            if self.epoch.load(Ordering::SeqCst) == epoch {
                let job = *self.job.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(job) = job {
                    self.take_pieces(job, thread);
                }
            }
            self.inside.fetch_sub(1, Ordering::SeqCst);
            done = epoch;
        }
    }

    /// The number of an open job that is not `done`; any number when the pool closes.
    fn await_job(&self, done: usize) -> usize {
        let open = || {
            let epoch = self.epoch.load(Ordering::SeqCst);
            let new = epoch % 2 == 1 && epoch != done;
            (new || self.closing.load(Ordering::Relaxed)).then_some(epoch)
        };
        loop {
            let mut looks = 0;
            while looks < LOOKS {
                if let Some(epoch) = open() {
                    return epoch;
                }
                look_away(&mut looks);
            }
            let bed = self.bed.lock().unwrap_or_else(PoisonError::into_inner);
            self.sleepers.fetch_add(1, Ordering::SeqCst);
            // Looked at once more under the lock that the bell takes: no ring is missed.
            let up = match open() {
                Some(_) => bed,
                None => self.bell.wait(bed).unwrap_or_else(PoisonError::into_inner),
            };
            self.sleepers.fetch_sub(1, Ordering::SeqCst);
            drop(up);
        }
    }

    fn ring(&self) {
        let _bed = self.bed.lock().unwrap_or_else(PoisonError::into_inner);
        self.bell.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use super::*;

    fn counted(pieces: usize) -> Vec<u64> {
        let counts: Vec<AtomicU64> = (0..pieces).map(|_| AtomicU64::new(0)).collect();
        parallel(pieces, |piece| {
            counts[piece].fetch_add(1, Ordering::Relaxed);
        });
        counts.into_iter().map(AtomicU64::into_inner).collect()
    }

    #[test]
    fn every_piece_is_done_once_with_and_without_a_pool() {
        assert_eq!(counted(7), [1; 7]);
        for threads in 1..5 {
            let pool = ComputePool::new(threads).expect("threads");
            pool.install(|| {
                for pieces in 0..200 {
                    assert_eq!(counted(pieces), vec![1; pieces]);
                }
            });
        }
    }

    #[test]
    fn a_share_goes_to_its_owner_from_the_first_and_to_others_from_the_last() {
        let share = Share::default();
        share.hand_out(10..15);
        let taken = [FROM_FRONT, FROM_BACK, FROM_FRONT, FROM_BACK, FROM_BACK];
        let taken = taken.map(|from| share.take(from));
        assert_eq!(taken, [10, 14, 11, 13, 12].map(Some));
        assert_eq!(
            [FROM_FRONT, FROM_BACK].map(|from| share.take(from)),
            [None; 2]
        );
        share.hand_out(3..3);
        assert_eq!(share.take(FROM_BACK), None);
        share.hand_out(0..1);
        assert_eq!(share.take(FROM_BACK), Some(0));
    }

    #[test]
    fn every_piece_of_uneven_shares_is_done_once() {
        let pool = ComputePool::new(3).expect("threads");
        for ends in [[0, 0, 9], [9, 9, 9], [1, 8, 9]] {
            let counts: Vec<AtomicU64> = (0..9).map(|_| AtomicU64::new(0)).collect();
            let first = |thread: usize, threads: usize| {
                assert_eq!(threads, 3);
                thread.checked_sub(1).map_or(0, |before| ends[before])
            };
            pool.install(|| {
                parallel_shares(9, first, |piece| {
                    counts[piece].fetch_add(1, Ordering::Relaxed);
                });
            });
            assert!(
                counts
                    .iter()
                    .all(|count| count.load(Ordering::Relaxed) == 1)
            );
        }
    }

    #[test]
    fn every_row_is_worked_on_once() {
        let pool = ComputePool::new(3).expect("threads");
        let number = |first: usize, width: usize, out: &mut [f32]| {
            for (row, out) in out.chunks_exact_mut(width).enumerate() {
                out.iter_mut()
                    .for_each(|value| *value += (first + row) as f32 + 1.0);
            }
        };
        for (rows, width) in [(0, 7), (3, 7), (5_000, 16), (5_001, 7)] {
            let expected = (0..rows * width).map(|i| (i / width) as f32 + 1.0);
            let expected = Vec::from_iter(expected);
            pool.install(|| {
                let mut out = vec![0f32; rows * width];
                fill_rows(&mut out, width, |first, out| number(first, width, out));
                assert_eq!(out, expected);
                assert_eq!(
                    new_rows(rows, width, |first, out| number(first, width, out)),
                    expected
                );
                for piece in [1, 2, 48, 9_000] {
                    let out = new_rows_in_pieces(rows, width, piece, |first, out| {
                        number(first, width, out);
                    });
                    assert_eq!(out, expected);
                }
            });
        }
    }

    #[test]
    fn what_a_thread_that_is_held_up_does_not_come_to_the_others_do() {
        let pool = ComputePool::new(3).expect("threads");
        let done = AtomicU64::new(0);
        let held_up = |piece: usize| {
            let begun = std::time::Instant::now();
            while piece == 0 && done.load(Ordering::SeqCst) < 29 {
                assert!(begun.elapsed().as_secs() < 60, "its pieces wait for it");
                std::thread::yield_now();
            }
            done.fetch_add(1, Ordering::SeqCst);
        };
        pool.install(|| parallel(30, held_up));
        assert_eq!(done.into_inner(), 30);
    }

    #[test]
    fn work_that_comes_after_a_sleep_is_done() {
        let pool = ComputePool::new(3).expect("threads");
        for _ in 0..20 {
            std::thread::sleep(std::time::Duration::from_millis(2));
            pool.install(|| assert_eq!(counted(64), [1; 64]));
        }
    }

    #[test]
    fn a_panic_in_a_piece_reaches_the_caller_and_the_pool_goes_on() {
        let pool = ComputePool::new(2).expect("threads");
        let run = || pool.install(|| parallel(16, |piece| assert_ne!(piece, 11, "on purpose")));
        assert!(catch_unwind(AssertUnwindSafe(run)).is_err());
        assert!(catch_unwind(AssertUnwindSafe(run)).is_err());
        pool.install(|| assert_eq!(counted(64), [1; 64]));
    }

    #[test]
    fn what_runs_beside_is_a_piece_of_the_first_long_job_and_runs_once() {
        for threads in 1..4 {
            let pool = ComputePool::new(threads).expect("threads");
            let times = AtomicU64::new(0);
            let main = || {
                assert_eq!(counted(9), [1; 9]);
                assert_eq!(
                    times.load(Ordering::Relaxed),
                    0,
                    "a short job takes nothing along"
                );
                for _ in 0..2 {
                    let total = AtomicU64::new(0);
                    parallel_long(9, |piece| {
                        total.fetch_add(piece as u64, Ordering::Relaxed);
                    });
                    assert_eq!(total.into_inner(), 36);
                    assert_eq!(times.load(Ordering::Relaxed), 1);
                }
            };
            let aside = || {
                times.fetch_add(1, Ordering::Relaxed);
            };
            pool.install(|| beside(aside, main));
            assert_eq!(times.into_inner(), 1);
        }
    }

    #[test]
    fn what_runs_beside_no_long_job_runs_after_it() {
        let mut times = 0;
        assert_eq!(beside(|| times += 1, || counted(3)), [1; 3]);
        assert_eq!(times, 1);
    }

    #[test]
    fn a_panic_beside_reaches_the_caller_and_nothing_is_left_over() {
        let pool = ComputePool::new(2).expect("threads");
        let run = || pool.install(|| beside(|| panic!("on purpose"), || parallel_long(16, |_| {})));
        assert!(catch_unwind(AssertUnwindSafe(run)).is_err());
        let main_panics = || pool.install(|| beside(|| {}, || -> u8 { panic!("on purpose") }));
        assert!(catch_unwind(AssertUnwindSafe(main_panics)).is_err());
        assert!(BESIDE.take().is_none());
        pool.install(|| assert_eq!(counted(64), [1; 64]));
    }

    #[test]
    fn a_piece_that_shares_its_own_work_does_it_alone() {
        let pool = ComputePool::new(2).expect("threads");
        let total = AtomicU64::new(0);
        pool.install(|| {
            parallel(4, |_| {
                parallel(5, |_| {
                    total.fetch_add(1, Ordering::Relaxed);
                });
            });
        });
        assert_eq!(total.into_inner(), 20);
    }
}
