use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
    mpsc::sync_channel,
};

use super::*;

fn thread() -> TorchThread {
    TorchThread::start(TorchSettings {
        intra_op_threads: 1,
    })
    .unwrap()
}

#[tokio::test]
async fn a_job_runs_on_the_torch_thread_and_returns_its_result() {
    let torch = thread();
    let name = torch
        .run("name", || {
            let tensor = Tensor::f_ones([2, 3], (Kind::Float, tch::Device::Cpu))?;
            assert!((tensor.f_sum(Kind::Float)?.f_double_value(&[])? - 6.0).abs() < 1e-9);
            Ok(std::thread::current().name().map(str::to_owned))
        })
        .await
        .unwrap();
    assert_eq!(name.as_deref(), Some("torch"));
}

#[test]
fn the_thread_count_holds_on_the_torch_thread() {
    let torch = TorchThread::start(TorchSettings {
        intra_op_threads: 2,
    })
    .unwrap();
    let threads = torch
        .run_blocking("threads", || Ok(tch::get_num_threads()))
        .unwrap();
    assert_eq!(threads, 2);
    torch.join();
}

#[test]
fn a_thread_count_of_zero_is_refused() {
    let error = TorchThread::start(TorchSettings {
        intra_op_threads: 0,
    })
    .unwrap_err();
    assert!(error.to_string().contains("at least 1"), "{error}");
}

#[test]
fn a_panic_becomes_an_error_and_the_thread_survives_with_gradients_on() {
    let torch = thread();
    let error = torch
        .run_blocking("explode", || -> Result<(), LearningError> {
            tch::no_grad(|| panic!("out of patience"))
        })
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "the torch job \"explode\" panicked: out of patience"
    );
    let tracks = torch
        .run_blocking("after", || {
            let leaf =
                Tensor::f_ones([1], (Kind::Float, tch::Device::Cpu))?.f_set_requires_grad(true)?;
            Ok(leaf.f_mul_scalar(2.0)?.requires_grad())
        })
        .unwrap();
    assert!(tracks);
}

#[test]
fn a_job_whose_caller_has_gone_is_skipped() {
    let torch = thread();
    let (release, wait) = sync_channel::<()>(1);
    let ran = Arc::new(AtomicBool::new(false));
    let (blocker, blocked) = package("blocker", move || {
        wait.recv().unwrap();
        Ok(())
    });
    let (abandoned, caller) = package("abandoned", {
        let ran = Arc::clone(&ran);
        move || {
            ran.store(true, Ordering::SeqCst);
            Ok(())
        }
    });
    torch.jobs.blocking_send(blocker).unwrap();
    torch.jobs.blocking_send(abandoned).unwrap();
    drop(caller);
    release.send(()).unwrap();
    blocked.blocking_recv().unwrap().unwrap();
    torch.join();
    assert!(!ran.load(Ordering::SeqCst));
}

#[test]
fn queued_jobs_still_run_when_the_thread_is_joined() {
    let torch = thread();
    let (job, result) = package("last", || Ok(7));
    torch.jobs.blocking_send(job).unwrap();
    torch.join();
    assert_eq!(result.blocking_recv().unwrap().unwrap(), 7);
}

#[test]
fn draws_equal_those_of_python_for_the_same_seed() {
    let drawn = seeded_randn(7, &[5], Kind::Float).unwrap();
    let mut values = [0.0_f32; 5];
    drawn.f_copy_data(&mut values, 5).unwrap();
    // torch.manual_seed(7); torch.randn(5).view(torch.int32)
    let python = [
        0xbe16_5174_u32,
        0x3f49_408e,
        0x3f72_62e7,
        0xbf8e_a2d3,
        0x3fd8_6bd0,
    ];
    assert_eq!(values.map(f32::to_bits), python);
    // torch.manual_seed(7); torch.randperm(10)
    assert_eq!(
        seeded_permutation(7, 10).unwrap(),
        [5, 0, 3, 4, 1, 7, 9, 6, 8, 2]
    );
}

#[test]
fn draws_from_several_threads_do_not_disturb_each_other() {
    let draw = |seed| {
        let tensor = seeded_randn(seed, &[1000], Kind::Float).unwrap();
        let mut values = vec![0.0_f32; 1000];
        tensor.f_copy_data(&mut values, 1000).unwrap();
        values
    };
    let alone: Vec<_> = (0..4).map(draw).collect();
    let together: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|seed| scope.spawn(move || (0..20).map(|_| draw(seed)).next_back()))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap().unwrap())
            .collect()
    });
    assert_eq!(alone, together);
}
