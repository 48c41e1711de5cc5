package clock

import "time"

// Over returns when something that expires at a time is over for everybody: not valid
// by anybody's clock. The ledger counts an SVID, and automatic rotation a keyset, until
// then.
func Over(expiry time.Time) time.Time { return expiry.Add(Skew) }
