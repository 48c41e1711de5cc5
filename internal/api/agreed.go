package api

// MaxMessage bounds a request of an operator, and an answer at the client, in
// bytes: 100,000 entries take about 30 MB, and twice that when all have changed.
// Nobody without a role gets to send one.
const MaxMessage = 128 << 20

// Reason and domain of the detail that marks a refusal as one for safety.
const (
	ReasonNotSafe = "NOT_SAFE"
	ErrorDomain   = "renewd"
)
