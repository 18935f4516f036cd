use super::*;
use proptest::prelude::*;

fn sent(window: &mut Window, count: u64, now: Instant) {
    for _ in 0..count {
        assert!(window.next().is_ok());
        window.on_sent(10, now);
    }
}

#[test]
fn a_trickle_is_committed_and_the_next_batch_follows_it() -> Result<(), PublishError> {
    let start = Instant::now();
    let mut window = Window::new(40);
    assert_eq!(window.due(), Due::Never);
    assert_eq!(window.next()?, (1, 1, Operation::Start, Some(40)));
    sent(&mut window, 3, start);
    assert_eq!(window.next()?, (1, 4, Operation::Append, None));
    assert_eq!(window.due(), Due::Commit(start + COMMIT_DELAY));
    assert_eq!(window.commit(), Some((1, 4)));
    window.on_commit_sent(start);
    assert!(window.is_committing());
    let acked = window.on_reply(
        Reply::Ended {
            count: 3,
            stream_seq: 43,
        },
        start,
    )?;
    assert_eq!(
        acked,
        Some(Acked {
            count: 3,
            stream_seq: 43
        })
    );
    assert!(window.is_settled());
    assert_eq!(window.due(), Due::Never);
    assert_eq!(window.next()?, (2, 1, Operation::Start, Some(43)));
    sent(&mut window, 100, start);
    let acked = window.on_reply(
        Reply::Flow {
            number: 100,
            flow: 100,
        },
        start,
    )?;
    assert_eq!(
        acked,
        Some(Acked {
            count: 103,
            stream_seq: 143
        })
    );
    assert_eq!(window.due(), Due::Commit(start + IDLE_MAX));
    Ok(())
}

#[test]
fn silence_leads_to_a_ping_and_then_to_a_timeout() -> Result<(), PublishError> {
    let start = Instant::now();
    let mut window = Window::new(0);
    sent(&mut window, u64::from(FLOW), start);
    assert_eq!(window.due(), Due::Ping(start + PING_DELAY));
    assert_eq!(window.ping(), Some((1, 100)));
    window.on_ping_sent();
    assert_eq!(window.due(), Due::Timeout(start + ACK_TIMEOUT));
    // An answer that tells nothing new buys no time.
    let flow = |number| Reply::Flow { number, flow: 100 };
    assert_eq!(window.on_reply(flow(0), start + PING_DELAY)?, None);
    assert_eq!(window.due(), Due::Timeout(start + ACK_TIMEOUT));
    // One that does lets the next wait begin.
    let later = start + PING_DELAY;
    sent(&mut window, u64::from(FLOW), later);
    assert!(window.on_reply(flow(100), later)?.is_some());
    assert_eq!(window.due(), Due::Ping(later + PING_DELAY));
    Ok(())
}

#[test]
fn an_unbroken_load_does_not_keep_a_batch_from_its_commit() -> Result<(), PublishError> {
    let start = Instant::now();
    let mut window = Window::new(0);
    sent(&mut window, u64::from(FLOW), start);
    let mut now = start;
    while now < start + BATCH_AGE_MAX - PING_DELAY {
        now += Duration::from_secs(1);
        sent(&mut window, u64::from(FLOW), now);
        let number = window.acked + u64::from(FLOW);
        window.on_reply(Reply::Flow { number, flow: FLOW }, now)?;
    }
    assert_eq!(window.due(), Due::Commit(start + BATCH_AGE_MAX));
    Ok(())
}

#[test]
fn a_foreign_message_and_an_early_end_are_noticed_at_the_commit() {
    let start = Instant::now();
    let committed = || {
        let mut window = Window::new(0);
        sent(&mut window, 3, start);
        window.on_commit_sent(start);
        window
    };
    let foreign = committed().on_reply(
        Reply::Ended {
            count: 3,
            stream_seq: 4,
        },
        start,
    );
    assert!(matches!(
        foreign,
        Err(PublishError::WrongLastSequence { .. })
    ));
    let early = committed().on_reply(
        Reply::Ended {
            count: 2,
            stream_seq: 2,
        },
        start,
    );
    assert!(matches!(
        early,
        Err(PublishError::Gap {
            expected: 3,
            found: 3
        })
    ));
}

#[test]
fn a_failed_window_lets_the_sender_learn_of_it() {
    let mut window = Window::new(0);
    window.fail();
    assert!(window.has_room(0, 0));
    assert!(matches!(window.next(), Err(PublishError::Closed)));
}

#[test]
fn bytes_and_messages_that_are_held_count() {
    let start = Instant::now();
    let mut window = Window::new(0);
    assert!(!window.has_room(0, PUBLISH_WINDOW_BYTES_MAX));
    window.on_sent(PUBLISH_WINDOW_BYTES_MAX - 1, start);
    assert!(window.has_room(0, 0));
    assert!(!window.has_room(0, 1));
    assert!(!window.has_room(2_000, 0));
}

proptest! {
    /// Whatever the order of sends, acknowledgements and commits: the count never falls, never passes what was
    /// sent, and the window keeps both of its bounds.
    #[test]
    fn counts_rise_and_bounds_hold(steps in prop::collection::vec((0_u8..4, 1_u64..300), 1..200)) {
        let now = Instant::now();
        let mut window = Window::new(7);
        let (mut total, mut count) = (0, 0);
        for (step, amount) in steps {
            let mut acked = None;
            match step {
                0 | 1 => {
                    for _ in 0..amount {
                        if window.has_room(0, 0) && window.next().is_ok() {
                            window.on_sent(20_000, now);
                            total += 1;
                        }
                    }
                }
                2 => {
                    let number = amount.min(window.sent);
                    acked = window.on_reply(Reply::Flow { number, flow: 100 }, now)?;
                }
                _ => {
                    if window.commit().is_some() {
                        window.on_commit_sent(now);
                        let (count, stream_seq) = (window.sent, window.base + window.sent);
                        acked = window.on_reply(Reply::Ended { count, stream_seq }, now)?;
                    }
                }
            }
            if let Some(acked) = acked {
                prop_assert!(acked.count > count && acked.count <= total);
                prop_assert_eq!(acked.stream_seq, 7 + acked.count);
                count = acked.count;
            }
            prop_assert!(window.bytes < PUBLISH_WINDOW_BYTES_MAX + 20_000);
            prop_assert!(window.outstanding() <= window.flow * FLOWS_OUTSTANDING_MAX);
            prop_assert_eq!(window.sizes.len() as u64, window.outstanding());
        }
    }
}
