package clock

import "time"

// Skew is how far the clocks of a trust domain's machines may differ, and how far the
// server's own may be set, without anything being taken for over while somebody
// takes it for valid.
const Skew = 5 * time.Minute

// Over returns when something that expires at a time is over for everybody: not valid
// by anybody's clock. The ledger counts an SVID, and automatic rotation a keyset, until
// then.
func Over(expiry time.Time) time.Time { return expiry.Add(Skew) }
