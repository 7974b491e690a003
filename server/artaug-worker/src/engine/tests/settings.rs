//! What the settings say of the machine, and what the model reads of a text.

use std::thread;

use concord_learning::torch::threads_in_use;

use super::*;

#[test]
fn the_engine_computes_with_as_many_threads_as_its_settings_say() {
    let folder = folder();
    for threads in [2, 1] {
        let settings = Settings {
            threads,
            ..settings(&folder)
        };
        let mut engine = opened(&settings);
        assert_eq!(threads_in_use(), threads);
        // The number is the calling thread's own, and any may call.
        let by_another = thread::scope(|scope| {
            let other = scope.spawn(|| {
                use_threads(7);
                draw(&mut engine, &[order("a red fox", 1, 0)]);
                threads_in_use()
            });
            other.join().unwrap()
        });
        assert_eq!(by_another, threads);
    }
}

#[test]
fn texts_that_the_model_does_not_read_to_their_end_are_counted_for_each_order() {
    let folder = folder();
    let mut engine = opened(&settings(&folder));
    // Each word is one of the 75 tokens that a text may have.
    let (whole, long) = ("the ".repeat(75), "the ".repeat(76));
    let mut advised = order(&long, 2, 2);
    let letters = "x ".repeat(100);
    advised.regions[1].prompt = RegionPrompt::new(letters.trim()).unwrap();
    let orders = [order(&whole, 1, 1), advised, order(&long, 3, 0)];
    assert_eq!(draw(&mut engine, &orders).cut, [0, 2, 1]);
}
