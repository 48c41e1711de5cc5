package clock

import "time"

// Over returns when something with the given expiry has expired by every machine's
// clock. The ledger counts an SVID, and automatic rotation a keyset, until then.
func Over(expiry time.Time) time.Time { return expiry.Add(Skew) }
