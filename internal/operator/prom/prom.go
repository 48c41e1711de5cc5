// Package prom reads the figures of a fleet's agents from Prometheus and
// answers from them whether a tainted authority can be removed, for a signing
// server that does not know it itself, such as a SPIRE server.
//
// The answer is never better than what is known. An agent counts as done with
// an authority only when all of this is true:
//
//   - Prometheus has it as an active target of the job, and the target is up;
//   - its newest scrape is at most two scrape intervals old;
//   - that scrape, and not an earlier one, says renewd_taint_settled 1.
//
// Everything is read from that one scrape: a sample counts only when it has the
// very time of the newest sample of up. Prometheus' lookback of five minutes
// therefore cannot make a dead agent look settled.
//
// Who an agent is it exports itself, in renewd_agent_info: its SPIFFE ID, and an ID
// of its process. Neither the instance label nor a time tells agents apart: one
// may be scraped twice, and relabeled meanwhile; two may be started in one moment.
// Scrapes of one process are of one agent. Two processes with one SPIFFE ID are
// clones, and never safe; a program that does not say who it is is not, either.
//
// Ask the Prometheus that scrapes the agents, not one that federates from it:
// only the first has the targets. Answers that replicas of it have been merged
// into are understood. The job must hold every agent, and a target must be one
// agent, not an address that several share. An agent that is no target is found
// out by its SPIFFE ID: the caller of [Client.Figures] knows which there must be.
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
	// JWT-SVIDs live for 24 hours unless configured otherwise; the hour more is
	// for clocks and scrapes that are late.
	defaultJWTLife = 25 * time.Hour
)

// Config says which Prometheus to ask and what to expect there. Only URL is
// required.
type Config struct {
	// URL is Prometheus' address; user and password in it are used for basic
	// auth and do not appear in errors.
	URL string
	// Job is the value of the job label of the agents; DefaultJob when empty.
	Job string
	// TrustDomain leaves out agents that say they serve another one; with or
	// without spiffe://. When empty all agents of the job count.
	TrustDomain string
	// Expected is the number of agents there must be. It stands in the place of
	// the SPIFFE IDs that the caller of Figures gives, unless it is 0.
	Expected int
	// JWTLife is how long a JWT-SVID lives at the most; 25 hours when 0. An
	// agent that starts again forgets until when its tokens last, so that is how
	// far back Prometheus is asked, and as long again for who was there then.
	JWTLife time.Duration
	// Client is for what the URL cannot say, such as an own CA; when nil a
	// usual one.
	Client *http.Client
	// Timeout bounds one call of Figures; ten seconds when 0.
	Timeout time.Duration
}

// Client asks one Prometheus. Its methods are safe for concurrent use.
type Client struct {
	cfg Config
	api v1.API
}

// New checks the configuration. It does not connect.
func New(c Config) (*Client, error) {
	u, err := url.Parse(c.URL)
	if err != nil || u.Host == "" || (u.Scheme != "http" && u.Scheme != "https") {
		// The text of a URL that cannot be parsed may hold a password.
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
		return nil, errors.New("prometheus: the URL cannot be used")
	}
	return &Client{cfg: c, api: v1.NewAPI(whole{client})}, nil
}

// Agent is what the newest scrape of one agent says. Where Up is false, only
// its Instance is known, and from before its last answer and what it held then.
type Agent struct {
	Instance   string    // the instance label
	ID         string    // SPIFFE ID; empty: it has not said, or more than one
	Process    string    // its process ID; empty: it does not say who it is
	Duplicated bool      // another process says that it has the same SPIFFE ID
	Up         bool      // it answered the newest scrape, and that is recent
	LastScrape time.Time // that it answered; zero: none within a day
	Version    string
	Sequence   uint64 // of the bundle that it applies; 0: none yet
	// What it holds that the X.509 authority signed: SVIDs, those that wait for
	// their renewal, streams that wait for the replacement.
	SVIDs, Pending, Streams int
	Seen                    bool // it has seen that the authority is tainted
	Settled                 bool // nothing on its node depends on the authority
}

// Figures are what Prometheus knows of one pair of authorities at one moment.
type Figures struct {
	At     time.Time // by Prometheus' clock
	Agents []Agent   // by instance; each process once
	// Expected is the number of agents there must be: those that were expected
	// and those that are there all the same. Missing is how many of them are
	// no targets.
	Expected, Missing int
	X509SVIDs         int // held by the agents, as far as is known
	// JWTExpiry is when the last JWT-SVID of the key ends that any agent has
	// reported; zero when none has.
	JWTExpiry time.Time
	// Holders are the agents that could still hold an SVID of the X.509
	// authority, with the reason silent, unidentified, duplicated, behind, renewing or
	// streams: first the targets, by instance, then those that are missing, by
	// SPIFFE ID. Where only their number is known they are one holder together.
	Holders []runbook.Holder
	Holding int // how many agents that is
	// X509Safe is true when there are no holders, JWTSafe when it is certain that
	// the last JWT-SVID has ended.
	X509Safe, JWTSafe bool
}

// Behind counts the agents that are not known to apply the bundle with the
// given sequence number or a later one.
func (f Figures) Behind(sequence uint64) int {
	n := f.Missing
	for _, a := range f.Agents {
		if !a.Up || a.Sequence < sequence {
			n++
		}
	}
	return n
}

// Figures asks for the figures of the X.509 authority and the JWT key with
// these IDs. expected are the SPIFFE IDs of the agents there must be; with none,
// and no number in the Config, the agents are those that Prometheus has as
// targets. An empty jwtKeyID asks for no JWT-SVIDs. Without any target, and when
// Prometheus answers in part only, there are no figures but an error.
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
	// The targets come first: one that is added later is not asked for, but one
	// that goes away is still missed.
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
	f := judge(at, c.cfg.TrustDomain, targets)
	// A fleet without agents is one that was looked for in the wrong place.
	if len(f.Agents) == 0 {
		return Figures{}, fmt.Errorf("no target of the job %q is an agent of %s", c.cfg.Job, cmp.Or(c.cfg.TrustDomain, "any trust domain"))
	}
	if c.cfg.Expected > 0 {
		f.missNumber(c.cfg.Expected)
	} else {
		f.missNamed(expected, targets)
	}
	if err := c.jwt(ctx, &f, jwtKeyID); err != nil {
		return Figures{}, err
	}
	return f, nil
}

// whole refuses what Prometheus, or what stands in for it, marks as less than
// the whole answer. The API package hides that mark for targets.
type whole struct{ api.Client }

func (w whole) Do(ctx context.Context, req *http.Request) (*http.Response, []byte, error) {
	resp, body, err := w.Client.Do(ctx, req)
	if err != nil {
		return resp, body, err
	}
	var answer struct {
		Warnings []string `json:"warnings"`
	}
	// What is no JSON at all is an error of the API package.
	if json.Unmarshal(body, &answer) == nil && len(answer.Warnings) > 0 {
		return resp, nil, fmt.Errorf("the answer may be incomplete: %s", strings.Join(answer.Warnings, "; "))
	}
	return resp, body, nil
}
