// Package prom reads the figures of a fleet's agents from Prometheus. They show whether
// a tainted authority can be removed from a signing server that does not know it, such
// as a SPIRE server.
//
// Unknown figures are never safe. An agent does not depend on an authority only if:
//
//   - Prometheus has it as an active target of the job, and the target is up;
//   - its newest scrape is at most two scrape intervals old;
//   - that scrape has renewd_taint_settled 1.
//
// Only samples with the time of the newest sample of up count. A dead agent therefore
// does not look settled during Prometheus' lookback of five minutes.
//
// Agents identify themselves in renewd_agent_info, by SPIFFE ID and process ID. The
// instance label is not enough: one agent may be scraped twice or relabeled. Scrapes of
// one process are of one agent. Two processes with one SPIFFE ID are duplicated agents
// and never safe. An agent without SPIFFE ID or process ID is never safe, either.
//
// Use the Prometheus that scrapes the agents, because one that federates from it lacks
// the targets. Merged answers of replicas work. The job must contain every agent, and
// each target must be one agent. The caller of [Client.Figures] gives the expected SPIFFE
// IDs, so that an agent that is no target is noticed.
package prom

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/prometheus/client_golang/api"
	v1 "github.com/prometheus/client_golang/api/prometheus/v1"

	"github.com/renewd/renewd/internal/operator/runbook"
)

// DefaultJob is the scrape job's name in the examples of deploy/.
const DefaultJob = "renewd-agent"

const (
	defaultTimeout = 10 * time.Second
	// JWT-SVIDs live at most 24 hours by default. One hour more allows for late
	// clocks and scrapes.
	defaultJWTLife = 25 * time.Hour
)

// Config configures a [Client]. Only URL is required.
type Config struct {
	// URL is Prometheus' address. It may contain user and password for basic auth,
	// which do not appear in errors.
	URL string
	// Job is the value of the job label of the agents; DefaultJob when empty.
	Job string
	// TrustDomain excludes agents of other trust domains; with or without spiffe://. If
	// it is empty, all agents of the job count.
	TrustDomain string
	// Expected is the expected number of agents. Unless it is 0, it replaces the
	// SPIFFE IDs that the caller of Figures gives.
	Expected int
	// JWTLife is the longest life of a JWT-SVID; 25 hours when 0. An agent forgets the
	// expiry of its JWT-SVIDs when it restarts, so queries reach back that long, and
	// as long again for the agents that were running then.
	JWTLife time.Duration
	// Client is the HTTP client, for example one with a CA of your own; may be nil.
	Client *http.Client
	// Timeout limits one call of Figures; ten seconds when 0.
	Timeout time.Duration
}

// Client queries one Prometheus. It is safe for concurrent use.
type Client struct {
	cfg Config
	api v1.API
}

// New returns a Client, or an error if the configuration is invalid. It does not
// connect.
func New(c Config) (*Client, error) {
	u, err := url.Parse(c.URL)
	if err != nil || u.Host == "" || (u.Scheme != "http" && u.Scheme != "https") {
		// The URL may hold a password.
		return nil, errors.New("prometheus: the URL must be like https://prometheus.example.org:9090")
	}
	if c.Expected < 0 || c.JWTLife < 0 || c.Timeout < 0 {
		return nil, errors.New("prometheus: the number of agents, the life of JWT-SVIDs and the timeout cannot be negative")
	}
	c.TrustDomain = strings.TrimPrefix(c.TrustDomain, "spiffe://")
	if c.Job == "" {
		c.Job = DefaultJob
	}
	if c.JWTLife == 0 {
		c.JWTLife = defaultJWTLife
	}
	if c.Timeout == 0 {
		c.Timeout = defaultTimeout
	}
	client, err := api.NewClient(api.Config{Address: c.URL, Client: c.Client})
	if err != nil {
		return nil, errors.New("prometheus: the URL is not valid")
	}
	return &Client{cfg: c, api: v1.NewAPI(completeAnswers{client})}, nil
}

// Agent is the newest scrape of an agent. If Up is false, only Instance, ID, LastScrape and
// SVIDs are set, from its last answer.
type Agent struct {
	Instance   string    // the instance label
	ID         string    // SPIFFE ID; empty: none exported, or several
	Process    string    // process ID; empty: unidentified
	Duplicated bool      // another process exports the same SPIFFE ID
	Up         bool      // the newest scrape was answered and is recent
	LastScrape time.Time // last answered scrape; zero: none within a day
	Version    string
	Hostname   string // of its node; empty: not exported
	Sequence   uint64 // of the bundle that it applies; 0: none yet
	// SVIDs of the X.509 authority that the agent holds, that are to be renewed, and
	// streams that have not been sent the replacement.
	SVIDs, Pending, Streams int
	Seen                    bool // it has seen that the authority is tainted
	Settled                 bool // nothing on its node depends on the authority
}

// Figures are the figures of an X.509 authority and a JWT key at one moment.
type Figures struct {
	At     time.Time // by Prometheus' clock
	Agents []Agent   // by instance; each process once
	// Expected counts the expected agents and the unexpected ones that are targets.
	// Missing counts those that are not targets.
	Expected, Missing int
	X509SVIDs         int // held by the agents, as far as known
	// JWTExpiry is the expiry of the last JWT-SVID of the key that an agent has
	// reported. It is zero if none has.
	JWTExpiry time.Time
	// Holders are the agents that may still hold an SVID of the X.509 authority, with
	// the reason silent, unidentified, duplicated, behind, renewing or streams.
	// Targets come first, by instance, then missing agents, by SPIFFE ID. If only the
	// number of missing agents is known, they are one holder.
	Holders []runbook.Holder
	Holding int // number of agents in Holders
	// X509Safe says that there are no holders, JWTSafe that the last JWT-SVID has
	// certainly expired.
	X509Safe, JWTSafe bool
}

// Behind counts the agents that are not known to apply the bundle with this sequence
// number or a later one.
func (f Figures) Behind(sequence uint64) int {
	n := f.Missing
	for _, a := range f.Agents {
		if !a.Up || a.Sequence < sequence {
			n++
		}
	}
	return n
}

// Figures returns the figures of an X.509 authority and a JWT key. expected are the
// SPIFFE IDs of the expected agents. Without them and Config.Expected, the targets are all
// agents. If jwtKeyID is empty, there are no figures of JWT-SVIDs. It fails if there is
// no target or if an answer is incomplete.
func (c *Client) Figures(ctx context.Context, x509AuthorityID, jwtKeyID string, expected []string) (Figures, error) {
	ctx, cancel := context.WithTimeout(ctx, c.cfg.Timeout)
	defer cancel()
	f, err := c.figures(ctx, x509AuthorityID, jwtKeyID, expected)
	if err != nil {
		return Figures{}, fmt.Errorf("figures from Prometheus: %w", err)
	}
	return f, nil
}

func (c *Client) figures(ctx context.Context, x509AuthorityID, jwtKeyID string, expected []string) (Figures, error) {
	// Reading the targets first keeps those that disappear during the queries.
	targets, err := c.targets(ctx)
	if err != nil {
		return Figures{}, err
	}
	at, err := c.clock(ctx)
	if err != nil {
		return Figures{}, err
	}
	if err := c.scrapes(ctx, at, x509AuthorityID, targets); err != nil {
		return Figures{}, err
	}
	if err := c.lastAnswers(ctx, at, x509AuthorityID, targets); err != nil {
		return Figures{}, err
	}
	f := evaluate(at, c.cfg.TrustDomain, targets)
	// A fleet without agents is most likely a wrong configuration.
	if len(f.Agents) == 0 {
		return Figures{}, fmt.Errorf("no target of the job %q is an agent of %s", c.cfg.Job, cmp.Or(c.cfg.TrustDomain, "any trust domain"))
	}
	if c.cfg.Expected > 0 {
		f.addMissingNumber(c.cfg.Expected)
	} else {
		f.addMissingIDs(expected, targets)
	}
	if err := c.jwt(ctx, &f, jwtKeyID); err != nil {
		return Figures{}, err
	}
	return f, nil
}

// completeAnswers fails for answers with warnings, which mark incomplete ones. The API
// package hides the warnings of targets.
type completeAnswers struct{ api.Client }

func (w completeAnswers) Do(ctx context.Context, req *http.Request) (*http.Response, []byte, error) {
	resp, body, err := w.Client.Do(ctx, req)
	if err != nil {
		return resp, body, err
	}
	var answer struct {
		Warnings []string `json:"warnings"`
	}
	// The API package reports malformed JSON.
	if json.Unmarshal(body, &answer) == nil && len(answer.Warnings) > 0 {
		return resp, nil, fmt.Errorf("the answer may be incomplete: %s", strings.Join(answer.Warnings, "; "))
	}
	return resp, body, nil
}
