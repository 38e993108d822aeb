package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"
)

func TestMain(m *testing.M) {
	if node := os.Getenv("QUARRY_EMPTY_NODE"); node != "" {
		if err := emptyNode(node); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	code := m.Run()
	if err := nothingLeft(); err != nil {
		fmt.Fprintln(os.Stderr, "after all scenarios:", err)
		code = max(code, 1)
	}
	os.Exit(code)
}

// folders of the domains of values.yaml on each node.
var folders = []string{"/var/lib/quarry/local", "/var/lib/quarry/xfs", "/srv/shared"}

// nothingLeft is an error while an image, a slab, or something that a person would have to look at is left.
func nothingLeft() error {
	c, err := connect()
	if err != nil {
		return err
	}
	for end := time.Now().Add(patience); ; time.Sleep(every) {
		err := c.nothing()
		if err == nil || time.Now().After(end) {
			return err
		}
	}
}

func (c *cluster) nothing() error {
	out, err := c.program(c.quarry, "images", "-o", "json")
	if err != nil {
		return err
	}
	var images []struct{ Handle, State, Reason string }
	if err := json.Unmarshal([]byte(out), &images); err != nil {
		return fmt.Errorf("kubectl quarry images says %q: %w", out, err)
	}
	var errs []error
	for _, i := range images {
		if i.State != "deleting" { // its last tags go ten minutes after its slab
			errs = append(errs, fmt.Errorf("image %s is left, %s %s", i.Handle, i.State, i.Reason))
		}
	}
	out, err = c.program(c.quarry, "check", "-o", "json")
	if err != nil {
		errs = append(errs, err)
	}
	var checked struct {
		Findings []struct{ ID, Kind, Message string }
	}
	if err := json.Unmarshal([]byte(out), &checked); err != nil {
		return fmt.Errorf("kubectl quarry check says %q: %w", out, err)
	}
	for _, f := range checked.Findings {
		if f.Kind != "clean" { // such as the tags of attachments that have ended
			errs = append(errs, fmt.Errorf("%s: %s", f.ID, f.Message))
		}
	}
	for _, n := range c.nodes {
		for _, f := range folders {
			out, err := c.program(c.command, "exec", n, "sh", "-c", "ls "+f+"/slabs")
			if slabs := strings.Fields(out); err != nil || len(slabs) > 0 {
				errs = append(errs, fmt.Errorf("%s on %s holds the slabs %q: %w", f, n, slabs, orNever(err)))
			}
		}
	}
	return errors.Join(errs...)
}
