package lvm

import (
	"testing"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/engine/enginetest"
	"github.com/quarry-csi/quarry/test/lab"
)

func TestConformanceThick(t *testing.T) {
	conforms(t, func(t testing.TB) *group { return newGroup(t, 600) }, engine.CapMeter, engine.CapImport)
}

func TestConformanceThin(t *testing.T) {
	conforms(t, func(t testing.TB) *group { return newGroup(t, 600).withPool(t, "300m", "4m") },
		engine.CapSnapshot, engine.CapClone, engine.CapMeter, engine.CapImport)
}

func conforms(t *testing.T, fresh func(t testing.TB) *group, expect ...engine.Capability) {
	lab.Need(t)
	var last *group
	enginetest.Run(t, enginetest.Harness{Slow: true, Expect: expect, Domain: func(t testing.TB) func(t testing.TB) engine.Engine {
		last = fresh(t)
		return last.opener()
	}, Foreign: func(t testing.TB, content []byte) string {
		last.foreign(t, "old", content)
		return "old"
	}})
}
