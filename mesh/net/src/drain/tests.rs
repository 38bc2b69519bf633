//! When a leaving node goes, in virtual time.

use super::*;

async fn at(start: Instant, ms: u64) {
    sleep_until(start + Duration::from_millis(ms)).await;
}

fn elapsed_ms(start: Instant) -> u128 {
    start.elapsed().as_millis()
}

#[tokio::test(start_paused = true)]
async fn it_goes_when_nothing_has_come_for_a_while() {
    let (stop, start) = (Stop::new(), Instant::now());
    let call = stop.begin().unwrap();
    stop.leave();
    assert!(stop.is_triggered());
    let traffic = async {
        at(start, 700).await;
        drop(call);
        // Sent before the router heard of it.
        at(start, 900).await;
        let late = stop.begin().unwrap();
        assert_eq!(stop.calls_under_way(), 1);
        at(start, 1000).await;
        drop(late);
    };
    tokio::join!(traffic, stop.drained(start + LEAVING_MAX));
    let took = elapsed_ms(start);
    assert!((1300..=1000 + 2 * QUIET.as_millis()).contains(&took), "{took} ms");
    assert!(stop.begin().is_none(), "calls are refused afterwards");
    assert_eq!(stop.calls_under_way(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_router_that_goes_on_sending_does_not_hold_it() {
    let (stop, start) = (Stop::new(), Instant::now());
    stop.leave();
    let traffic = async {
        for tenth in 1..200 {
            drop(stop.begin());
            at(start, 100 * tenth).await;
        }
    };
    tokio::select! {
        () = stop.drained(start + LEAVING_MAX) => {}
        () = traffic => panic!("held for 20 s"),
    }
    assert_eq!(start.elapsed(), LEAVING_MAX);
    // Nor does a call that never ends.
    let (stop, start) = (Stop::new(), Instant::now());
    let _call = stop.begin();
    stop.drained(start + LEAVING_MAX).await;
    assert_eq!(start.elapsed(), LEAVING_MAX);
}

#[tokio::test(start_paused = true)]
async fn the_second_word_ends_it_at_once() {
    let (stop, start) = (Stop::new(), Instant::now());
    let _call = stop.begin();
    stop.leave();
    let again = async {
        at(start, 50).await;
        stop.leave();
    };
    tokio::join!(again, stop.drained(start + LEAVING_MAX), stop.wait());
    assert_eq!(elapsed_ms(start), 50);
    stop.out_of_time(Duration::from_millis(200)).await;
    assert_eq!(elapsed_ms(start), 250);
}

#[tokio::test(start_paused = true)]
async fn a_session_is_over_in_bounded_time_whatever_the_peer_does() {
    let (stop, start) = (Stop::new(), Instant::now());
    stop.leave();
    stop.out_of_time(Duration::from_millis(200)).await;
    assert_eq!(start.elapsed(), HANDED_OVER_MAX + LEAVING_MAX + Duration::from_millis(200));
    let (stop, start) = (Stop::new(), Instant::now());
    stop.trigger();
    stop.drained(start + LEAVING_MAX).await;
    stop.out_of_time(Duration::from_millis(200)).await;
    assert_eq!(elapsed_ms(start), 200);
}
