package metrics

import (
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// AuthorityState is where a signing authority is in its life, as this node knows it.
type AuthorityState string

// The states of an authority, in the order of its life.
const (
	StatePrepared AuthorityState = "prepared" // in the bundle, and signing nothing yet or no longer
	StateActive   AuthorityState = "active"   // the newest SVID is signed by it
	StateTainted  AuthorityState = "tainted"  // in the bundle, and what it signed is being replaced
	StateSettled  AuthorityState = "settled"  // tainted, and nothing on this node depends on it
	StateRemoved  AuthorityState = "removed"  // not in the bundle, and something held is signed by it
)

// String returns the state's name.
func (s AuthorityState) String() string { return string(s) }

// Tainted reports whether the authority is in the bundle with a taint mark.
func (s AuthorityState) Tainted() bool { return s == StateTainted || s == StateSettled }

// label returns the state label's value: renewd_taint_settled tells a settled
// authority from a tainted one.
func (s AuthorityState) label() string {
	if s.Tainted() {
		return string(StateTainted)
	}
	return string(s)
}

// The values of the bundle label: which trust bundles are meant.
const (
	BundleOwn       = "own"
	BundleFederated = "federated" // all of them together
)

// TypeUnknown is the svid_type of an authority that is of neither type.
const TypeUnknown = "unknown"

// The streaming RPCs of the Workload API, values of the rpc label.
const (
	RPCX509SVID    = "FetchX509SVID"
	RPCX509Bundles = "FetchX509Bundles"
	RPCJWTBundles  = "FetchJWTBundles"
)

// State is the state of the agent at one moment. A zero time means unknown and leaves out
// its series.
type State struct {
	// Authorities has every authority of the own trust domain's bundle, and removed
	// ones that an SVID still depends on. The pair of Type and ID is unique.
	Authorities []Authority
	// OwnID and OwnExpiry are the SPIFFE ID of the agent SVID and when it expires.
	OwnID     string
	OwnExpiry time.Time
	// ClockLag is how far at least this node's clock is behind the server's.
	ClockLag time.Duration
	// BundleApplied is when the current bundle was applied.
	BundleApplied time.Time
	// BundleSequence is that bundle's sequence number. It is exported only
	// with BundleApplied.
	BundleSequence uint64
	// Expiring counts the SVIDs more than a minute past half of their life, by
	// svid_type ([TypeX509], [TypeJWT]).
	Expiring map[string]int
	// JWTExpiry is the latest expiry of any JWT-SVID handed out, by key ID.
	JWTExpiry map[string]time.Time
	// LeftOut counts the unusable authorities in the current trust bundles.
	LeftOut []LeftOut
	// SVIDs counts the entries whose X.509-SVID is to be held, by each of its states.
	SVIDs map[string]int
	// EntriesMissing counts the registration entries that the server does not list at
	// present and that this node still serves.
	EntriesMissing int
	// Streams counts the open Workload API streams by RPC ([RPCX509SVID], ...).
	Streams map[string]int
	// Unsaved tells for each file of data_dir whether its content is still to be
	// written after a failure.
	Unsaved map[string]bool
}

// Authority is what on this node depends on one signing authority.
type Authority struct {
	Type string // [TypeX509] or [TypeJWT]
	ID   string // X.509: subject key ID in hex; JWT: key ID
	// State is exported as not settled while Held, Pending or Streams is not 0:
	// removing a key too early cannot be undone.
	State AuthorityState
	Held  int // SVIDs held that it signed
	// Pending counts the renewals that are not done. Streams counts the open streams,
	// and the processes whose streams have ended, that were sent one of its SVIDs and
	// have not read the replacement, and after a restart of the agent the open streams
	// that have read nothing yet. Both are exported for tainted and removed X.509
	// authorities.
	Pending, Streams int
}

// LeftOut is the number of unusable authorities of one type.
type LeftOut struct {
	Bundle string // [BundleOwn] or [BundleFederated]
	Type   string // [TypeX509], [TypeJWT] or [TypeUnknown]
	Count  int
}

// settled applies the rule of [Authority.State].
func (a Authority) settled() bool {
	return a.State == StateSettled && a.Held == 0 && a.Pending == 0 && a.Streams == 0
}

var (
	descExpiring = desc("spirl_agent_svid_expiring",
		"SVIDs held that are more than a minute past half of their life and not renewed. If this stays above 0, renewals fail.", "svid_type")
	descHeld = desc("renewd_svids_held",
		"SVIDs this node holds for its workloads, by the authority that signed them and its state.", "svid_type", "authority", "state")
	descSVIDs = desc("renewd_svids",
		"Registration entries whose X.509-SVID this node is to hold, by its state: waiting for the first one, minting, fresh, due, backing_off after a failure, stale (tainted authority, the node's delay is not over) or expired.", "state")
	descPending = desc("renewd_taint_renewals_pending",
		"SVIDs of a tainted or removed authority that wait for their renewal.", "authority")
	descUnsent = desc("renewd_taint_streams_waiting",
		"Open Workload API streams, and workload processes whose streams have ended, that were sent an SVID of a tainted or removed authority and have not read its replacement.", "authority")
	descSettled = desc("renewd_taint_settled",
		"1 if nothing on this node depends on the tainted authority: as far as this node knows, it is safe to remove. Remove the key only when all nodes show 1.", "authority")
	descApplied = desc("renewd_bundle_applied_timestamp_seconds",
		"When the current trust bundle was applied, as Unix time.")
	descSequence = desc("renewd_bundle_sequence_number",
		"Sequence number of the current trust bundle. Nodes that lag behind show a lower one.")
	descJWTExpiry = desc("renewd_jwt_svid_latest_expiry_timestamp_seconds",
		"When the last JWT-SVID that this node handed out with the key expires, as Unix time. After that no token of this node depends on the key.", "key_id")
	descOwnExpiry = desc("renewd_agent_svid_expiry_timestamp_seconds",
		"When the agent SVID expires, as Unix time. After that the agent has to re-attest.", "spiffe_id")
	descAgent = desc("renewd_agent_info",
		"Always 1. The labels identify the agent: its SPIFFE ID, empty before it has an SVID, a random ID of this process, and the node's hostname.", "spiffe_id", "process_id", "hostname")
	descClockLag = desc("renewd_agent_clock_lag_seconds",
		"How far at least this node's clock is behind the server's, by the newest X.509-SVID: 0 if that one was valid at once. If it is above 0, set the clock: workloads on this node may reject each other's SVIDs.")
	descLeftOut = desc("renewd_bundle_authorities_left_out",
		"Unusable authorities in the current trust bundles, which are left out, by bundle (own, federated) and type. The log names them.", "bundle", "svid_type")
	descMissing = desc("renewd_entries_missing",
		"Registration entries that the server does not list at present and that this node still serves. Deleted entries are dropped after entry_removal_delay. If this stays above 0, the server's answers change.")
	descStreams = desc("renewd_streams_open",
		"Open Workload API streams by RPC.", "rpc")

	descUnsaved = desc("renewd_data_dir_unsaved",
		"1 while the content of this file of data_dir cannot be written: a restart would read the previous content. The agent retries every few seconds, and the log has the error.", "file")

	stateDescs = []*prometheus.Desc{descExpiring, descHeld, descSVIDs, descPending, descUnsent, descSettled,
		descApplied, descSequence, descLeftOut, descJWTExpiry, descOwnExpiry, descAgent, descClockLag, descMissing, descStreams, descUnsaved}
)

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(name, help, labels, nil)
}

// stateCollector exports one snapshot for each scrape.
type stateCollector struct {
	source            func() State
	process, hostname string
}

func (c stateCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range stateDescs {
		ch <- d
	}
}

func (c stateCollector) Collect(ch chan<- prometheus.Metric) {
	s := c.source()
	gauge, stamp := exporters(ch)
	for _, a := range s.Authorities {
		gauge(descHeld, float64(a.Held), a.Type, a.ID, a.State.label())
		if a.Type != TypeX509 || (!a.State.Tainted() && a.State != StateRemoved) {
			continue
		}
		gauge(descPending, float64(a.Pending), a.ID)
		gauge(descUnsent, float64(a.Streams), a.ID)
		if a.State.Tainted() {
			gauge(descSettled, boolValue(a.settled()), a.ID)
		}
	}
	for _, typ := range []string{TypeX509, TypeJWT} {
		gauge(descExpiring, float64(s.Expiring[typ]), typ)
	}
	for _, rpc := range []string{RPCX509SVID, RPCX509Bundles, RPCJWTBundles} {
		gauge(descStreams, float64(s.Streams[rpc]), rpc)
	}
	for _, l := range s.LeftOut {
		gauge(descLeftOut, float64(l.Count), l.Bundle, l.Type)
	}
	for state, n := range s.SVIDs {
		gauge(descSVIDs, float64(n), state)
	}
	gauge(descMissing, float64(s.EntriesMissing))
	for file, unsaved := range s.Unsaved {
		gauge(descUnsaved, boolValue(unsaved), file)
	}
	for kid, t := range s.JWTExpiry {
		stamp(descJWTExpiry, t, kid)
	}
	stamp(descOwnExpiry, s.OwnExpiry, s.OwnID)
	gauge(descAgent, 1, s.OwnID, c.process, c.hostname)
	gauge(descClockLag, s.ClockLag.Seconds())
	stamp(descApplied, s.BundleApplied)
	if !s.BundleApplied.IsZero() {
		gauge(descSequence, float64(s.BundleSequence))
	}
}

func boolValue(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// exporters returns a function that sends a gauge to ch, and one that sends a time unless
// it is zero.
func exporters(ch chan<- prometheus.Metric) (
	gauge func(d *prometheus.Desc, v float64, labels ...string),
	stamp func(d *prometheus.Desc, t time.Time, labels ...string),
) {
	gauge = func(d *prometheus.Desc, v float64, labels ...string) {
		for i := range labels {
			labels[i] = text(labels[i])
		}
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	stamp = func(d *prometheus.Desc, t time.Time, labels ...string) {
		if !t.IsZero() {
			gauge(d, float64(t.UnixMilli())/1e3, labels...)
		}
	}
	return gauge, stamp
}

// text replaces the bytes of a label value that are not UTF-8, which would make the
// exporter panic.
func text(s string) string { return strings.ToValidUTF8(s, "\uFFFD") }
