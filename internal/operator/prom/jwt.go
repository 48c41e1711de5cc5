package prom

import (
	"context"
	"errors"
	"fmt"
	"math"
	"regexp"
	"strconv"
	"time"

	"github.com/prometheus/common/model"
)

// gapStep is the step of the search for gaps in the history. It is Prometheus' lookback,
// so each step sees all scrapes since the one before, and no gap of ten minutes is missed.
const gapStep = 5 * time.Minute

// jwt reads the figures of the JWT-SVIDs of the key. An agent exports the latest expiry of
// those that it has handed out, but forgets it at a restart. All of them have expired in
// one of two cases only:
//
//   - An agent saw the key tainted at least JWTLife ago. A server stops signing with a key
//     before it taints it.
//   - All that agents reported have expired, and no agent can have forgotten one: each
//     process of the last JWTLife is running now and was running at its beginning.
func (c *Client) jwt(ctx context.Context, f *Figures, keyID string) error {
	if keyID == "" {
		return nil
	}
	life, begin := c.cfg.JWTLife.Milliseconds(), f.At.Add(-c.cfg.JWTLife)
	job, key := label(c.cfg.Job), label(exported(keyID))

	reported, err := c.vector(ctx, f.At, `max(max_over_time(%s{job=%s,key_id=%s}[%dms]))`, seriesJWT, job, key, life)
	if err != nil {
		return err
	}
	if len(reported) > 0 {
		// Round up, so that the expiry is not too early.
		f.JWTExpiry = time.Unix(int64(math.Ceil(float64(reported[0].Value))), 0)
	}
	// The range allows for a Prometheus that was down at that moment.
	tainted, err := c.vector(ctx, begin, `count(last_over_time(%s{job=%s,svid_type="jwt",authority=%s,state="tainted"}[%dms]))`, seriesHeld, job, key, life)
	if err != nil {
		return err
	}
	if len(tainted) > 0 {
		f.JWTSafe = true
		return nil
	}
	if f.JWTExpiry.After(f.At) {
		return nil
	}
	f.JWTSafe, err = c.historyComplete(ctx, f, begin)
	return err
}

// historyComplete reports whether no agent can have forgotten a JWT-SVID that it handed
// out since begin. During a gap in the scrapes an agent may have started and ended.
func (c *Client) historyComplete(ctx context.Context, f *Figures, begin time.Time) (bool, error) {
	running := make(map[string]bool)
	for _, a := range f.Agents {
		if a.Process == "" || a.Duplicated {
			return false, nil
		}
		running[a.Process] = true
	}
	if f.Missing > 0 {
		return false, nil
	}
	job, life := label(c.cfg.Job), c.cfg.JWTLife.Milliseconds()
	scraped, err := c.vector(ctx, f.At, `count_over_time(count(%s{job=%s})[%dms:%dms])`, seriesUp, job, life, gapStep.Milliseconds())
	if err != nil {
		return false, err
	}
	var moments int64
	if len(scraped) > 0 {
		moments = int64(scraped[0].Value)
	}
	// Subquery steps are multiples of the step since 1970.
	if step := gapStep.Milliseconds(); moments < f.At.UnixMilli()/step-begin.UnixMilli()/step {
		return false, nil
	}
	trustDomain := ""
	if c.cfg.TrustDomain != "" {
		trustDomain = fmt.Sprintf(",%s=~%s", labelID, strconv.Quote("spiffe://"+regexp.QuoteMeta(c.cfg.TrustDomain)+"/.*"))
	}
	query := fmt.Sprintf(`group by (%s) (last_over_time(%s{job=%s%s}[%dms]))`, labelProcess, seriesAgent, job, trustDomain, life)
	since, err := c.vector(ctx, f.At, "%s", query)
	if err != nil {
		return false, err
	}
	for _, s := range since {
		if !running[string(s.Metric[labelProcess])] {
			return false, nil
		}
	}
	before, err := c.vector(ctx, begin, "%s", query)
	if err != nil {
		return false, err
	}
	for _, s := range before {
		delete(running, string(s.Metric[labelProcess]))
	}
	return len(running) == 0, nil
}

// vector executes a query about JWT-SVIDs at a moment.
func (c *Client) vector(ctx context.Context, at time.Time, query string, args ...any) (model.Vector, error) {
	v, _, _, err := c.api.Query(ctx, fmt.Sprintf(query, args...), at)
	if err != nil {
		return nil, fmt.Errorf("query the JWT-SVIDs: %w", err)
	}
	vector, ok := v.(model.Vector)
	if !ok {
		return nil, errors.New("query the JWT-SVIDs: the answer is no vector")
	}
	return vector, nil
}
